"""ft.compile: equal to eager, traced once, no compilation for a changed value, old states consumed."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from later import Later
from programs import cut, lowered
from torch import Tensor

import functrain as ft
from functrain.compiler import compilation, engine
from functrain.models import gpt2
from functrain.transforms import ConsumedError

cutting = Later("functrain.compiler.cutting")  # which loads torch's compiler, for 2 s

CONFIG = gpt2.Config(vocab=61, context=16, layers=2, heads=2, width=16)


def gpt_loss(params: Any, batch: Any, key: Tensor) -> ft.Loss:
    config = dataclasses.replace(CONFIG, layers=len(params["blocks"]))
    hidden = gpt2.hidden(params, batch["tokens"], config, key=key)
    return ft.losses.next_token_from_hidden(hidden, params["wte"], batch["targets"])


def adamw(learning_rate: Any = 1e-2) -> ft.optim.GradientTransformation:
    decayed = ft.optim.adamw(learning_rate, weight_decay=0.1, mask=lambda p: ft.tree.map(lambda x: x.dim() > 1, p))
    return ft.optim.chain(ft.optim.clip_by_global_norm(1.0), decayed)


def batch_of(seed: int) -> dict[str, Tensor]:
    tokens = ft.random.randint(ft.random.key(seed), (4, 17), 0, 61).long()
    return {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}


def mlp_loss(params: Any, batch: Any, key: Tensor) -> ft.Loss:
    x = params["wte"][batch["tokens"]]
    logits = ft.nn.linear(torch.tanh(ft.nn.linear(x, **params["up"])), **params["down"])
    return ft.losses.next_token(logits, batch["targets"])


def problem(way: str, optimizer: Any, layers: int = 2) -> tuple[Any, ft.TrainState]:
    """A GPT in pieces; something smaller as a whole, which takes long to compile for many layers."""
    key = ft.random.key(0)
    if way == "piecewise":
        params = gpt2.init(dataclasses.replace(CONFIG, layers=layers), key)
        return gpt_loss, ft.init_state(params, optimizer, key=key)
    tokens, up, down = ft.random.split(key, 3).unbind()
    params = {
        "wte": ft.random.normal(tokens, (61, 8)),
        "up": {"weight": ft.random.normal(up, (8, 8)), "bias": torch.zeros(8)},
        "down": {"weight": ft.random.normal(down, (8, 61)), "bias": torch.zeros(61)},
    }
    return mlp_loss, ft.init_state(params, optimizer, key=key)


def clone(tree: Any) -> Any:
    return ft.tree.map(torch.clone, tree)


def run(step: Any, state: Any, batches: Any) -> tuple[Any, list[float]]:
    losses = []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.fixture(params=["whole", "piecewise"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(compilation, "_PIECEWISE_BYTES", 0 if request.param == "piecewise" else 2**62)
    return str(request.param)


# accumulating as a whole, and not in pieces, are held by tests/transforms/test_accumulate.py and by torch.nn below
@pytest.mark.parametrize(("way", "accumulate"), [("whole", 1), ("piecewise", 3)], indirect=["way"])
def test_five_compiled_donated_steps_equal_five_eager_pure_steps(way: str, accumulate: int) -> None:
    loss_fn, start = problem(way, adamw())
    step, batches = ft.train_step(loss_fn, adamw(), accumulate=accumulate), [batch_of(i) for i in range(5)]
    kept = clone(start)
    eager, eager_losses = run(step, start, batches)
    assert all(torch.equal(a, b) for a, b in zip(ft.tree.leaves(start), ft.tree.leaves(kept), strict=True))
    compiled, compiled_losses = run(ft.compile(step, donate=True), clone(start), batches)
    # float32 rounding of sums in another order: 1e-7 relative a step, grown by Adam's division near gradients of 0
    assert compiled_losses == pytest.approx(eager_losses, rel=2e-6)
    assert ft.tree.allclose(compiled.params, eager.params, rtol=1e-3, atol=2e-4)
    assert int(compiled.step) == int(eager.step) == 5
    assert torch.equal(compiled.key, eager.key)


@pytest.mark.parametrize(("attention", "compute"), [("math", torch.float32), ("fused", torch.bfloat16)])
def test_a_compiled_loss_leaves_its_parameters_and_has_their_gradient(
    attention: Any, compute: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # wide enough that Inductor finds values to overwrite: narrower models did not show what this is about
    config = gpt2.Config(vocab=256, context=32, layers=2, heads=4, width=128, attention=attention)
    tokens = ft.random.randint(ft.random.key(1), (4, 33), 0, 256).long()

    def loss_fn(params: Any) -> ft.Loss:
        hidden = gpt2.hidden(params, tokens[:, :-1], config)
        return ft.losses.next_token_from_hidden(hidden, params["wte"], tokens[:, 1:])

    policy = ft.Policy(compute=compute)
    gradient = ft.value_and_grad(ft.mixed_precision(loss_fn, policy))
    params = gpt2.init(config, ft.random.key(0))
    kept, (_, expected) = clone(params), gradient(params)
    cut(monkeypatch)
    compiled = ft.compile(gradient)
    for _ in range(2):  # the second call meets what the first one left
        _, grads = compiled(params)
    changed = [path for (path, a), b in zip(ft.tree.items(params), ft.tree.leaves(kept), strict=True) if not a.equal(b)]
    assert changed == []
    # float32 sums in another order; in bfloat16 every stored value is rounded to 8 bits, in other places when fused
    limit = 1e-4 if compute == torch.float32 else 0.1
    for (path, a), b in zip(ft.tree.items(grads), ft.tree.leaves(expected), strict=True):
        assert ft.tree.norm(a - b) <= limit * ft.tree.norm(b), path


@pytest.mark.parametrize("options", [{}, {"accumulate_rows": 2}], ids=["at once", "in parts"])
def test_a_changed_value_neither_traces_nor_compiles_again(
    way: str, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced, programs = [], lowered(monkeypatch)

    def loss_fn(params: Any, batch: Any, key: Tensor) -> ft.Loss:
        traced.append(batch["x"].shape)
        errors = batch["x"] @ params["w"] - batch["y"]
        return ft.Loss(torch.sum(errors**2), errors.new_tensor(float(errors.numel())), {})

    optimizer = adamw(ft.schedules.linear_schedule(1e-2, 0.0, 10))
    step = ft.compile(ft.train_step(loss_fn, optimizer, **options), donate=True)
    state = ft.init_state({"w": torch.ones(3, 2)}, optimizer, key=ft.random.key(0))
    batch = {"x": torch.linspace(-1, 1, 12).reshape(4, 3), "y": torch.ones(4, 2)}
    counts = []
    for i in range(4):
        state, _ = step(state, {name: value + i for name, value in batch.items()})
        counts.append((len(traced), len(programs)))
    # a batch in two equal parts is traced once as well
    assert len(traced) == 1 and counts == [counts[0]] * 4
    step(state, {name: value[:3] for name, value in batch.items()})
    # another shape is another program, and of its parts the second one has a shape of its own
    assert len(traced) == (3 if options else 2) and len(programs) > counts[0][1]


def test_another_autocast_or_default_dtype_is_another_program() -> None:
    x = torch.ones(2, 2)
    product = compilation.interpret(lambda x: torch.ones(2).to(x.device) @ (x @ x).to(torch.get_default_dtype()))
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert product(x).dtype == torch.bfloat16
        assert product(x).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert product(x).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_deterministic_algorithms_are_another_program() -> None:
    counted: list[bool] = []

    @compilation.interpret
    def fn(x: Tensor) -> Tensor:
        counted.append(torch.are_deterministic_algorithms_enabled())
        return x + 1

    try:
        for wanted in (False, True, False, True):
            torch.use_deterministic_algorithms(wanted)
            fn(torch.ones(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert counted == [False, True]


def test_threads_compile_side_by_side_with_each_other_and_with_torch() -> None:
    x, failed = torch.linspace(0, 1, 40), list[BaseException]()
    start = threading.Barrier(4)

    def compiled(wrap: Any, factor: float) -> None:
        def fn(x: Tensor) -> Tensor:
            return torch.sin(x * factor) + factor

        try:
            start.wait(60)
            # float32, a vectorized sine
            torch.testing.assert_close(wrap(fn)(x), fn(x), rtol=1e-5, atol=1e-5)
        except BaseException as error:
            failed.append(error)

    wraps = [ft.compile, ft.compile, ft.compile, torch.compile]
    threads = [threading.Thread(target=compiled, args=(wrap, 31.0 + i)) for i, wrap in enumerate(wraps)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_arguments_by_keyword_are_those_by_position() -> None:
    def fn(x: Tensor, y: Tensor, scale: float = 2.0) -> Tensor:
        return x - scale * y

    compiled = ft.compile(fn)
    x, y = torch.ones(2), torch.arange(2.0)
    for found in (compiled(x, y, 2.0), compiled(x, y=y, scale=2.0), compiled(scale=2.0, y=y, x=x), compiled(x, y=y)):
        assert torch.equal(found, fn(x, y))
    assert len(compiled.programs) == 1 and compiled.describe(y=y, x=x) == compiled.describe(x, y, 2.0)
    with pytest.raises(TypeError, match="missing a required argument: 'y'"):
        compiled(x=x)


def test_an_argument_without_a_position_is_told_with_a_way_out() -> None:
    def fn(x: Tensor, *, scale: float) -> Tensor:
        return scale * x

    with pytest.raises(TypeError, match=r"came scale, which .* by keyword only; .*functools.partial\(fn, scale=...\)"):
        ft.compile(fn)(torch.ones(2), scale=2.0)


def test_a_function_that_is_compiled_again_and_again_is_told_where_it_is_called() -> None:
    fn = compilation.interpret(lambda x, n: x * n)
    with pytest.warns(UserWarning, match="compiled for the 4th time: argument 1 is .*, 3.*, and was .*, 2") as told:
        for n in range(5):
            fn(torch.ones(2), n)
    assert [w.filename for w in told if "compiled for" in str(w.message)] == [__file__]


def test_zeros_of_two_signs_are_two_values_and_nan_is_one() -> None:
    traces = []

    def scaled(x: Tensor, number: float) -> Tensor:
        traces.append(number)
        return x * number

    compiled, x = ft.compile(scaled), torch.ones(2)
    for number in (0.0, -0.0, float("nan"), float("nan")):
        found, expected = compiled(x, number), x * number
        assert torch.equal(found.isnan(), expected.isnan())
        assert number != number or torch.equal(found.signbit(), expected.signbit()), number
    assert len(traces) == 3


def test_a_value_without_a_hash_names_its_place() -> None:
    with pytest.raises(TypeError, match=r"1/x: expected a tensor, .* came ndarray"):
        ft.compile(lambda a, b: a)(torch.ones(1), {"x": torch.ones(1).numpy()})


def test_a_step_is_as_many_programs_for_any_number_of_layers(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    programs, counts = lowered(monkeypatch), []
    for layers in (2, 3) if way == "piecewise" else (2,):
        programs.clear()
        loss_fn, state = problem(way, adamw(), layers)
        run(ft.compile(ft.train_step(loss_fn, adamw()), donate=True), state, [batch_of(0), batch_of(1)])
        counts.append(Counter(program.which for program in programs))
    if way == "whole":
        assert counts == [Counter(inference=1)]
    else:
        # the layers each way; before, between and behind them; norms, columns and the rest of the update
        assert counts[0] == counts[1] and counts[0]["forward"] == counts[0]["backward"] == 1


def test_a_consumed_state_is_an_error_and_the_new_one_is_not(way: str) -> None:
    optimizer = ft.optim.sgd(0.1)
    step = ft.compile(ft.train_step(lambda p, b, k: torch.sum((p["w"] - b) ** 2), optimizer), donate=True)
    old = ft.init_state({"w": torch.zeros(3)}, optimizer, key=ft.random.key(0))
    new, _ = step(old, torch.ones(3))
    for use in (lambda t: t + 1, lambda t: t.shape, lambda t: t.sum(), lambda t: t.numpy(), lambda t: t[0]):
        with pytest.raises(ConsumedError, match="donated"):
            use(old.params["w"])
    assert repr(old.params["w"]) == "<donated tensor>"
    with pytest.raises(ConsumedError, match="donated"):
        step(old, torch.ones(3))
    assert torch.allclose(new.params["w"], torch.full((3,), 0.2))


def test_without_donation_the_arguments_stay() -> None:
    step = ft.compile(ft.train_step(lambda p, b, k: torch.sum((p["w"] - b) ** 2), ft.optim.sgd(0.1)))
    state = ft.init_state({"w": torch.zeros(3)}, ft.optim.sgd(0.1), key=ft.random.key(0))
    first, _ = step(state, torch.ones(3))
    again, _ = step(state, torch.ones(3))
    assert torch.equal(state.params["w"], torch.zeros(3))
    assert torch.equal(first.params["w"], again.params["w"])


def test_the_new_state_takes_the_old_ones_memory(way: str) -> None:
    loss_fn, state = problem(way, adamw())
    step = ft.compile(ft.train_step(loss_fn, adamw()), donate=True)
    places = [leaf.data_ptr() for leaf in ft.tree.leaves(state)]
    state, _ = step(state, batch_of(0))
    assert [leaf.data_ptr() for leaf in ft.tree.leaves(state)] == places


def test_a_state_that_cannot_be_donated_names_the_leaf() -> None:
    double = ft.compile(lambda state, x: (ft.tree.map(lambda leaf: leaf * 2, state), x), donate=True)
    shared = torch.ones(2)
    with pytest.raises(ValueError, match="a and b/0 share one memory"):
        double({"a": shared, "b": [shared]}, shared)
    with pytest.raises(TypeError, match="a: expected a tensor, came int 3"):
        double({"a": 3}, shared)
    grow = ft.compile(lambda state: ({"a": torch.cat([state["a"], state["a"]])}, None), donate=True)
    with pytest.raises(TypeError, match=r"a: expected torch.float32 \(2,\) .* came torch.float32 \(4,\)"):
        grow({"a": torch.ones(2)})
    rename = ft.compile(lambda state: ({"b": state["a"]}, None), donate=True)
    with pytest.raises(ValueError, match="missing: 'a'"):
        rename({"a": torch.ones(2)})


def test_silent_traps_are_errors_when_compiled(way: str) -> None:
    optimizer = ft.optim.sgd(0.1)
    captured = torch.ones(3, requires_grad=True)
    traps = {
        "does not depend": lambda p, b, k: torch.sum(p["w"].detach()),
        "not an argument": lambda p, b, k: torch.sum(p["w"] * captured),
    }
    for message, loss_fn in traps.items():
        step = ft.compile(ft.train_step(loss_fn, optimizer), donate=True)
        with pytest.raises(ValueError, match=message):
            step(ft.init_state({"w": torch.ones(3)}, optimizer, key=ft.random.key(0)), torch.ones(3))


def test_compile_goes_outermost() -> None:
    compiled = ft.compile(lambda x: torch.sum(x**2))
    with pytest.raises(TypeError, match="outermost"):
        ft.grad(compiled)(torch.ones(3))
    with pytest.raises(TypeError, match="outermost"):
        compiled(torch.ones(3, requires_grad=True))
    # a program that is there already must not take what is differentiated for a number
    assert torch.equal(compiled(torch.ones(3)), torch.tensor(3.0))
    for fn in (ft.grad(lambda x: compiled(x[0]) + torch.sum(x)), ft.vmap(compiled), torch.func.vmap(compiled)):
        with pytest.raises(TypeError, match="outermost"):
            fn(torch.ones(2, 3))
    inside = ft.compile(ft.grad(lambda x: torch.sum(x**2)))
    assert torch.equal(inside(torch.ones(3)), torch.full((3,), 2.0))
    assert torch.equal(ft.compile(lambda x: compiled(x) * 2)(torch.ones(3)), torch.tensor(6.0))


def test_a_donated_step_inside_of_a_map_is_an_error_that_says_so() -> None:
    step = ft.compile(lambda x: (2 * x, x), donate=True)
    with pytest.raises(TypeError, match="outermost"):
        ft.vmap(step)(torch.ones(2, 3))


def test_forward_mode_is_traced_with_other_transforms() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.sum(torch.sin(x) * torch.cat([x[:2], x[2:]]))

    def along(x: Tensor) -> Tensor:
        return torch.func.jvp(f, (x,), (x.new_ones(5),))[1]

    x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    mixed = ft.grad(lambda x: torch.sum(torch.func.jacfwd(ft.grad(f))(x)[0]))
    mapped, forward_twice = ft.vmap(torch.func.hessian(f)), lambda x: torch.func.jvp(along, (x,), (x,))
    for fn, argument in ((mixed, x), (mapped, x[None] * x[:, None]), (forward_twice, x)):
        found, wanted = compilation.interpret(fn)(argument), fn(argument)
        assert all(torch.equal(a, b) for a, b in zip(ft.tree.leaves(found), ft.tree.leaves(wanted), strict=True))


_X = torch.linspace(-1, 1, 36, dtype=torch.float64).view(3, 3, 4)


@pytest.mark.parametrize("x", [_X[1], _X[:, 1], _X[::2, ::2, 1], torch.diagonal(_X[0]), _X[1:1], _X[1, 1, 1], _X.mT])
def test_forward_mode_takes_parts_of_other_tensors(x: Tensor) -> None:
    def f(x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        z[...] = x
        return torch.sum(torch.sin(x.unsqueeze(0)) * x[None] * z)

    def along(x: Tensor) -> Tensor:
        return torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]

    mapped = ft.vmap(lambda scale: torch.func.jvp(along, (scale * x,), (x,))[1])
    for fn, argument in ((along, x), (lambda x: torch.func.jvp(along, (x,), (x,))[1], x), (mapped, torch.ones(2))):
        torch.testing.assert_close(compilation.interpret(fn)(argument), fn(argument.clone()), rtol=1e-13, atol=1e-13)


def test_higher_transforms_compile() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.sum(torch.sin(x) * x)

    x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    second = ft.grad(lambda x: torch.sum(ft.grad(f)(x) ** 2))
    mapped = ft.vmap(ft.grad(f))
    # float64: a compiled sin may differ from the eager one in the last place
    torch.testing.assert_close(ft.compile(second)(x), second(x), rtol=1e-12, atol=1e-12)
    rows = x[None] * x[:, None]
    torch.testing.assert_close(ft.compile(mapped)(rows), mapped(rows), rtol=1e-12, atol=1e-12)


def test_compiled_and_eager_draw_the_same_bits(way: str) -> None:
    def loss_fn(params: Any, batch: Any, key: Tensor) -> Tensor:
        return torch.sum(ft.nn.dropout(params["w"] * batch, 0.5, key))

    optimizer = ft.optim.sgd(1.0)
    step = ft.train_step(loss_fn, optimizer)
    state = ft.init_state({"w": torch.zeros(64)}, optimizer, key=ft.random.key(3))
    eager, _ = step(state, torch.ones(64))
    compiled, _ = ft.compile(step, donate=True)(clone(state), torch.ones(64))
    assert torch.equal(eager.params["w"], compiled.params["w"])
    assert 10 < int(torch.sum(eager.params["w"] != 0)) < 54


def test_steps_equal_torch_nn_and_adamw_on_the_same_weights(way: str) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    x, y = torch.randn(8, 5), torch.randn(8, 1)
    linear = (module[0], module[2])
    layer = [{"weight": m.weight.detach().T.clone(), "bias": m.bias.detach().clone()} for m in linear]

    def loss_fn(params: Any, batch: Any, key: Tensor) -> Tensor:
        h = torch.tanh(ft.nn.linear(batch["x"], **params[0]))
        return torch.mean((ft.nn.linear(h, **params[1]) - batch["y"]) ** 2)

    optimizer = ft.optim.adamw(1e-2, weight_decay=0.1)
    step = ft.compile(ft.train_step(loss_fn, optimizer), donate=True)
    _, ours = run(step, ft.init_state(layer, optimizer, key=ft.random.key(0)), [{"x": x, "y": y}] * 5)
    theirs = []
    adam = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        adam.zero_grad()
        loss = torch.nn.functional.mse_loss(module(x), y)
        loss.backward()
        adam.step()
        theirs.append(loss.item())
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_whatever_python_runs_is_traced(way: str) -> None:
    calls: list[int] = []

    class Scaled:
        def __init__(self, factor: float) -> None:
            self.factor = factor

        def __rmatmul__(self, x: Tensor) -> Tensor:
            calls.append(len(calls))
            return x * self.factor

    def halves() -> Iterator[Any]:
        yield from map(Scaled, np.full(2, 0.5).tolist())

    def loss_fn(params: Any, batch: Tensor, key: Tensor) -> Tensor:
        torch._dynamo.graph_break()  # nobody asks Dynamo
        w = functools.reduce(lambda x, half: x @ half, halves(), params["w"])
        return torch.sum(w**2 * batch)

    optimizer = ft.optim.sgd(1.0)
    step = ft.compile(ft.train_step(loss_fn, optimizer))
    state = ft.init_state({"w": torch.ones(3)}, optimizer, key=ft.random.key(0))
    for _ in range(2):
        found, _ = step(state, torch.ones(3))
        assert torch.equal(found.params["w"], torch.full((3,), 1 - 2 / 16))
    assert calls == [0, 1]


def test_results_may_be_arguments_views_of_them_and_one_another() -> None:
    def fn(x: Tensor, w: Tensor) -> Any:
        y = x @ w
        return [x, w.mT, y.mT, y[0], y, y, y.split(2)[1], y.flatten(), w[0, 1], 3, None, [w.mT]]

    x, w = torch.arange(16.0).view(4, 4), torch.eye(4) * 2
    expected, found = fn(x, w), ft.compile(fn)(x, w)
    assert ft.tree.structure(found) == ft.tree.structure(expected)
    for a, b in zip(ft.tree.leaves(found), ft.tree.leaves(expected), strict=True):
        assert torch.equal(a, b) if isinstance(b, Tensor) else a == b  # whole numbers: exact in every order


def test_a_donated_state_may_trade_its_leaves_and_hand_out_the_old_ones() -> None:
    def fn(s: Any) -> Any:
        new = {"a": s["b"], "b": s["a"], "c": s["c"].mT, "d": s["d"] + s["a"], "e": s["e"], "f": s["d"] * 2}
        return new, s["a"], s["c"][0], s["d"].view(4), s["f"] + s["a"]

    def start() -> dict[str, Tensor]:
        return {name: torch.arange(4.0).view(2, 2) + 10 * i for i, name in enumerate("abcdef")}

    expected, kept = fn(start()), start()
    for found in (ft.compile(fn, donate=True)(kept), compilation.interpret(fn)(start())):
        for (path, a), b in zip(ft.tree.items(found), ft.tree.leaves(expected), strict=True):
            assert torch.equal(a, b), path
    swapped = ft.compile(lambda s: ({"a": s["b"], "b": s["a"]}, s["a"]), donate=True)
    new, old = swapped({"a": torch.zeros(2), "b": torch.ones(2)})
    assert torch.equal(new["a"], torch.ones(2)) and torch.equal(new["b"], torch.zeros(2))
    assert torch.equal(old, torch.zeros(2))


def test_one_half_of_a_key_may_be_for_the_loss_and_the_other_for_the_update(way: str) -> None:
    def step(p: Tensor, key: Tensor) -> Tensor:
        drop, noise = ft.random.split(key).unbind()
        grads = ft.grad(lambda p: torch.sum(ft.nn.dropout(p, 0.5, drop) ** 2))(p)
        return p - grads + ft.random.bits(noise, (3,)) % 8

    p, key = torch.arange(3.0), ft.random.key(0)
    assert torch.equal(ft.compile(step)(p, key), step(p, key))  # whole numbers


def test_what_a_loss_hands_out_of_a_donated_state_is_the_old_one(way: str) -> None:
    def loss(p: Tensor) -> Any:
        return torch.sum(p**2), [p, p.mT, p[:1], p.detach() + 0]

    def step(p: Tensor) -> Any:
        (_, seen), grads = ft.value_and_grad(loss, has_aux=True)(p)
        return p - grads, seen

    p = torch.arange(4.0).view(2, 2)
    _, expected = step(p)
    _, found = ft.compile(step, donate=True)(p.clone())
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


READING = {
    "if": (lambda x: x if x.sum() > 0 else -x, r"test_compile.py:\d+: .*if.*expected Python that is the same"),
    "item": (lambda x: x * float(x.sum()), r"test_compile.py:\d+: .*float.*torch.where"),
    "shape": (lambda x: x[x > 0], "nonzero.*weigh rows with 0"),
    "distribution": (
        lambda x: torch.distributions.Normal(x, x, validate_args=True).mean,
        "Normal.*validate_args=False",
    ),
}


@pytest.mark.parametrize("name", READING)
def test_a_function_that_reads_numbers_is_an_error_that_names_its_line(name: str) -> None:
    fn, says = READING[name]
    with pytest.raises(TypeError, match=says):
        ft.compile(fn)(torch.ones(3))
    assert not engine.here.tracing


@torch.library.custom_op("functrain_tests::switches", mutates_args=())
def _switches(x: Tensor) -> Tensor:
    """The identity; tells how torch's switches stand while it runs."""
    SEEN.append(switches())
    return x.clone()


SEEN: list[Any] = []
_switches.register_fake(lambda x: torch.empty_like(x))
_switches.register_autograd(lambda ctx, grad: _switches(grad))


def switches() -> dict[str, Any]:
    backends = torch.backends
    return {
        "oneDNN": backends.mkldnn.enabled,
        "oneDNN deterministic": backends.mkldnn.deterministic,
        "nnpack": torch._C._get_nnpack_enabled(),
        "cudnn": backends.cudnn.enabled,
        "cudnn benchmark": backends.cudnn.benchmark,
        "products": torch.get_float32_matmul_precision(),
        "fused attention": backends.cuda.flash_sdp_enabled(),
        "efficient attention": backends.cuda.mem_efficient_sdp_enabled(),
        "plain attention": backends.cuda.math_sdp_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "anomaly": torch.is_anomaly_enabled(),
    }


@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_switch_of_torchs_differs_while_a_compiled_step_runs(way: str, accumulate: int) -> None:
    # oneDNN was off in the forward pass of large steps: convolutions took twice as long, bfloat16 nine times
    optimizer = ft.optim.sgd(0.1)

    def loss_fn(params: Any, batch: Tensor, key: Tensor) -> ft.Loss:
        return ft.Loss(torch.sum(torch.ops.functrain_tests.switches(batch @ params["w"])), torch.tensor(4.0), {})

    step = ft.compile(ft.train_step(loss_fn, optimizer, accumulate=accumulate))
    state = ft.init_state({"w": torch.ones(8, 8)}, optimizer, key=ft.random.key(0))
    before = switches()
    step(state, torch.ones(4, 8))
    SEEN.clear()
    step(state, torch.ones(4, 8))
    assert SEEN == [before] * 2 * accumulate  # forward and backward
    assert switches() == before


@pytest.mark.parametrize(("leaves", "bytes_each", "in_pieces"), [(64, 4, False), (65, 4, True), (1, 2**20, True)])
def test_what_is_large_or_has_many_leaves_is_compiled_in_pieces(
    leaves: int, bytes_each: int, in_pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    class Spy(cutting.Cutter):
        def __init__(self, *, layers: bool) -> None:
            made.append(layers)
            super().__init__(layers=layers)

    monkeypatch.setattr(cutting, "Cutter", Spy)
    ft.compile(lambda xs, y: y)([torch.zeros(bytes_each // 4) for _ in range(leaves)], torch.ones(()))
    assert made[0] is in_pieces
