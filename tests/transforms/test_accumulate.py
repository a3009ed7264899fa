"""Laws of accumulate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import peak_bytes
from programs import lowered
from torch import Tensor

import functrain as ft
from functrain import tree
from functrain.compiler import compilation, half_products
from functrain.transforms import accumulation
from functrain.transforms.gradient import add_gradients

law = settings(deadline=None, derandomize=True, max_examples=40)
KEY = ft.random.key(0)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def squares(params: Any, batch: Any, key: Tensor) -> ft.Loss:
    errors = torch.tanh(batch["x"] @ params["w"] + params["b"]) - batch["y"]  # (B,)
    mask = batch["mask"].to(errors.dtype)
    return ft.Loss(torch.sum(mask * errors**2), torch.sum(mask), {"absolute": torch.sum(mask * errors.abs())})


def problem(seed: int, rows: int) -> tuple[Any, Any]:
    params = {"w": draw(seed, 3), "b": draw(seed + 1)}
    mask = torch.randint(0, 2, (rows,), generator=torch.Generator().manual_seed(seed))
    return params, {"x": draw(seed + 2, rows, 3), "y": draw(seed + 3, rows), "mask": mask}


def assert_close(a: Any, b: Any) -> None:
    # sums of at most 12 terms of size about 10 in another order: 12 * 10 * 2**-53 = 1.4e-14
    tree.map(lambda x, y: torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13), a, b)


@law
@given(seed=st.integers(0, 10**6), data=st.data(), rows=st.integers(1, 12))
def test_accumulate_equals_the_whole_batch(seed: int, data: Any, rows: int) -> None:
    parts = data.draw(st.integers(1, rows))
    params, batch = problem(seed, rows)
    batch["mask"] = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=rows, max_size=rows)))
    grad_fn = ft.value_and_grad(squares)
    got = ft.accumulate(grad_fn, parts)(params, batch, KEY)
    assert isinstance(got[0], ft.Loss)
    assert_close(got, grad_fn(params, batch, KEY))


@law
@given(rows=st.integers(1, 12), data=st.data())
def test_parts_are_the_rows_in_order_and_as_equal_as_can_be(rows: int, data: Any) -> None:
    parts = data.draw(st.integers(2, rows)) if rows > 1 else 1
    seen: list[list[int]] = []

    def fn(params: Tensor, batch: Tensor, key: Tensor) -> Tensor:
        seen.append(batch.tolist())
        return torch.sum(params * batch)

    ft.accumulate(ft.value_and_grad(fn), parts)(torch.ones(()), torch.arange(rows), KEY)
    assert sum(seen, []) == list(range(rows)) and len(seen) == parts
    sizes = [len(part) for part in seen]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


def test_one_part_is_the_function_itself() -> None:
    grad_fn = ft.value_and_grad(squares)
    assert ft.accumulate(grad_fn, 1) is grad_fn


def test_part_i_draws_from_the_key_folded_with_i() -> None:
    keys: list[Tensor] = []

    def fn(params: Tensor, batch: Tensor, key: Tensor) -> Tensor:
        keys.append(key)
        return torch.sum(params * batch)

    ft.accumulate(ft.value_and_grad(fn), 3)(torch.ones(()), torch.ones(5), KEY)
    assert all(torch.equal(key, ft.random.fold_in(KEY, i)) for i, key in enumerate(keys)) and len(keys) == 3


@pytest.mark.parametrize("way", ["eager", "whole", "pieces"])
def test_half_precision_losses_are_added_in_float32(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(params: Any, batch: Any, key: Tensor) -> ft.Loss:
        return ft.Loss(torch.sum(params["w"] * batch["x"]), torch.sum(batch["x"]), {"rows": torch.sum(batch["x"])})

    monkeypatch.setattr(compilation, "_PIECEWISE_BYTES", 0 if way == "pieces" else 2**62)
    # 300 parts that count 3 each: beyond 512 a bfloat16 has steps of 4
    batch, tx = {"x": torch.ones(900, dtype=torch.bfloat16)}, ft.optim.sgd(1.0)
    step = ft.train_step(loss, tx, accumulate_rows=3 if way != "whole" else 100)
    state = ft.init_state({"w": torch.ones((), dtype=torch.bfloat16)}, tx, key=KEY)
    _, metrics = (step if way == "eager" else ft.compile(step))(state, batch)
    assert {value.dtype for value in metrics.values()} == {torch.float32}
    assert {name: float(value) for name, value in metrics.items()} == {
        "weight": 900.0, "loss": 1.0, "rows": 1.0, "grad_norm": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_added_in_float32(dtype: torch.dtype) -> None:
    def fn(params: Tensor, batch: Tensor, key: Tensor) -> Tensor:
        return torch.sum(params * batch)

    # 2**12 + 1 - 2**12 = 1, but next to 2**12 both half precisions have steps of 4 or more, so that a sum kept in
    # them would forget the ones: 2**12 + 7 * 1 - 2**12 would be 0
    batch = torch.tensor([4096.0] + [1.0] * 7 + [-4096.0], dtype=dtype)
    _, grads = ft.accumulate(ft.value_and_grad(fn), 9)(torch.ones((), dtype=dtype), batch, KEY)
    assert grads.dtype == dtype and grads.item() == 7.0


def test_accumulate_is_pure_and_keeps_no_graph() -> None:
    params, batch = problem(0, 5)
    before = tree.map(torch.clone, (params, batch))
    fn = ft.accumulate(ft.value_and_grad(squares), 2)
    first, second = fn(params, batch, KEY), fn(params, batch, KEY)
    same = tree.map(torch.equal, (first, params, batch), (second, *before))
    assert all(tree.leaves(same)) and not any(leaf.requires_grad for leaf in tree.leaves(first))


def test_accumulate_composes_with_vmap_and_grad() -> None:
    params, batch = problem(0, 5)
    whole, parts = (ft.accumulate(ft.value_and_grad(squares), n) for n in (1, 3))
    both = tree.map(lambda leaf: torch.stack([leaf, 2 * leaf]), params)
    mapped = [ft.vmap(fn, in_dims=(0, None, None))(both, batch, KEY) for fn in (parts, whole)]
    assert_close(*mapped)
    second = [ft.grad(lambda p, fn=fn: tree.norm(fn(p, batch, KEY)[1]))(params) for fn in (parts, whole)]
    assert_close(*second)


def test_train_step_equals_the_whole_batch_for_every_number_of_parts() -> None:
    params, batch = problem(0, 7)
    optimizer = ft.optim.sgd(0.1)
    state = ft.init_state(params, optimizer, key=KEY)
    whole, metrics = ft.train_step(squares, optimizer)(state, batch)
    for parts in range(2, 8):
        got, measured = ft.train_step(squares, optimizer, accumulate=parts)(state, batch)
        assert_close((got.params, measured), (whole.params, metrics))


def test_the_programs_do_not_grow_with_the_number_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    programs, traced, found = lowered(monkeypatch), [], {}

    def noting(params: Any, batch: Any, key: Tensor) -> ft.Loss:
        traced.append(len(batch["x"]))
        return squares(params, batch, key)

    for parts, rows in ((2, 6), (5, 15), (4, 11)):  # the last: three parts of three rows, one of two
        params, batch = problem(0, rows)
        tx = ft.optim.sgd(0.1)
        traced.clear(), programs.clear()
        new, _ = ft.compile(ft.train_step(noting, tx, accumulate=parts))(ft.init_state(params, tx, key=KEY), batch)
        whole, _ = ft.train_step(squares, tx)(ft.init_state(params, tx, key=KEY), batch)
        assert_close(new.params, whole.params)
        passes = [program for program in programs if program.which != "inference"]
        found[parts] = [*traced], sorted((p.which, p.operations.total()) for p in passes)
    assert found[2][0] == found[5][0] == [3] and found[4][0] == [3, 2]
    assert found[2][1] == found[5][1] and len(found[2][1]) == 2, "a forward and a backward program"
    assert len(found[4][1]) == 4


def layered(params: Any, batch: Any, key: Tensor) -> ft.Loss:
    x = batch["x"]
    for layer in params:
        x = torch.tanh(x @ layer["w"]) + layer["b"]
    return ft.Loss(torch.sum(batch["mask"] * torch.sum(x**2, 1)), torch.sum(batch["mask"]), {})


def stacked(params: Any, batch: Any, key: Tensor) -> ft.Loss:
    x = ft.nn.stack(lambda layer, x: torch.tanh(x @ layer["w"]) + layer["b"], params, batch["x"])
    return ft.Loss(torch.sum(batch["mask"] * torch.sum(x**2, 1)), torch.sum(batch["mask"]), {})


# compiled, each case is 10 s: one with and one without each of a stack, half precision and a scale
@pytest.mark.parametrize(
    ("way", "dtype", "scaled"),
    [
        ("eager", torch.float32, False),
        ("eager", torch.bfloat16, False),
        ("eager", torch.bfloat16, True),
        ("compiled", torch.float32, False),
        ("compiled", torch.bfloat16, True),
        ("stacked", torch.bfloat16, False),
    ],
)
def test_gradients_of_a_part_never_lie_all_beside_their_sum(way: str, dtype: torch.dtype, scaled: bool) -> None:
    width, layers = 256, 8
    params = [{"w": draw(i, width, width).to(dtype) / 16, "b": torch.zeros(width, dtype=dtype)} for i in range(layers)]
    batch = {"x": draw(9, 7, width).to(dtype), "mask": torch.tensor([1, 0, 1, 1, 1, 0, 1]).to(dtype)}
    tx = ft.optim.sgd(1e-2)
    scale = {"loss_scale": ft.loss_scale.static(2.0**10)} if scaled else {}
    step = ft.train_step(stacked if way == "stacked" else layered, tx, accumulate=3, **scale)
    run = step if way == "eager" else ft.compile(step, donate=True)
    state = ft.init_state(params, tx, key=KEY, **scale)
    whole, metrics = ft.train_step(layered, tx, **scale)(state, batch)
    new, measured = run(state, batch)
    # the unit of the params where they are about 1, and of the gradient where it is about 1
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-9}
    tree.map(lambda a, b: torch.testing.assert_close(a, b, **close), (new.params, measured), (whole.params, metrics))
    factor_of = (lambda loss: loss.weight) if scaled else None
    gradients = accumulation.sums(add_gradients(layered, factor_of=factor_of), 3, rows=None, buffers=False)
    peak = peak_bytes(lambda: gradients(params, batch, KEY) if way == "eager" else run(new, batch))
    size = layers * (width + 1) * width * 4  # of the sum, float32
    # the sum, the gradients of a layer, the rows; all gradients beside their sum are 1.5 in bfloat16 and 2 in float32.
    # Compiled, a product is added as it is computed, or rounded to bfloat16 before; on a CPU without products in
    # bfloat16 it lies there in float32, and so do the weights that it is of
    half = 1.3 if half_products.are_slow(dtype) else 1.2
    most = 1.4 if way == "eager" else 1.05 if dtype == torch.float32 else half
    assert size < peak < most * size


def test_gradients_of_a_layer_are_added_inside_of_its_backward_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "_PIECEWISE_BYTES", 0)
    programs = lowered(monkeypatch)
    params = [{"w": draw(i, 96, 96) / 10, "b": draw(i, 96)} for i in range(3)]  # large enough to be added in place
    batch = {"x": draw(9, 4, 96), "mask": torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)}
    gradients = accumulation.sums(add_gradients(stacked), 2, rows=None, buffers=False)
    found = ft.compile(lambda *args: gradients(*args))(params, batch, KEY)
    # 96 terms of about 1 in another order, in float64
    tree.map(
        lambda a, b: torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12),
        found,
        ft.value_and_grad(stacked)(params, batch, KEY),
    )
    backward = [program.operations for program in programs if program.which == "backward"]
    # a product is added as it is computed, and never there by itself: what is left multiplies for the x of a layer
    assert sorted((o["addmm_"], o["copy_"], o["mm"]) for o in backward) == [(1, 1, 0), (1, 1, 1)]


def test_what_a_gradient_reads_may_change_from_part_to_part() -> None:
    read: dict[str, Tensor] = {}
    gradient = ft.value_and_grad(lambda w: ft.Loss(torch.sum(w * read["batch"]), torch.ones(()), {}))

    def grad_fn(params: Tensor, batch: Tensor, key: Tensor) -> Any:
        read["batch"] = batch
        return gradient(params)

    accumulated, batch = ft.accumulate(grad_fn, 2), torch.arange(4.0).view(2, 2)
    assert torch.equal(ft.compile(accumulated)(torch.ones(2), batch, KEY)[1], torch.tensor([2.0, 4.0]))


def test_a_part_of_next_to_no_weight_does_not_spoil_the_sum_under_a_loss_scale() -> None:
    def loss(params: Any, batch: Any, key: Tensor) -> ft.Loss:
        errors = (batch["x"] @ params["w"]) ** 2
        return ft.Loss(torch.sum(batch["weights"] * errors), torch.sum(batch["weights"]), {})

    weights = torch.tensor([3.0, 1e4, 1e-30, 0.0, 2.0, 1e-35])
    params, batch = {"w": torch.ones(3)}, {"x": draw(0, 6, 3).float(), "weights": weights}
    tx, scale = ft.optim.sgd(1e-3), ft.loss_scale.static(2.0**40)
    state = ft.init_state(params, tx, key=KEY, loss_scale=scale)
    new, metrics = ft.train_step(loss, tx, accumulate=6, loss_scale=scale)(state, batch)
    whole, _ = ft.train_step(loss, tx)(ft.init_state(params, tx, key=KEY), batch)
    assert metrics["skipped"] == 0
    torch.testing.assert_close(new.params, whole.params, rtol=1e-5, atol=1e-6)  # float32, about 1


def test_a_part_keeps_less_for_its_backward_pass_than_a_step_without_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(params: Any, batch: Any, key: Tensor) -> ft.Loss:
        x = ft.nn.stack(lambda w, x: x + ft.nn.gelu(x @ w) @ w.mT, params, batch["x"])
        return ft.Loss(torch.sum(x**2), x.new_full((), len(x)), {})

    monkeypatch.setattr(compilation, "_PIECEWISE_BYTES", 0)
    params, tx, peaks = [draw(i, 16, 64) / 8 for i in range(4)], ft.optim.sgd(1e-3), []
    # a loop of one turn is one of parts as well: the next batch may be larger
    for rows, options in ((512, {}), (512, {"accumulate_rows": 512}), (1024, {"accumulate_rows": 512})):
        step, batch = ft.compile(ft.train_step(loss, tx, **options)), {"x": draw(9, rows, 16)}
        state = ft.init_state(params, tx, key=KEY)
        step(state, batch)
        peaks.append(peak_bytes(lambda step=step, state=state, batch=batch: step(state, batch)))
    # of what a layer makes, its input and two values of four times the width, the one behind gelu is made again
    assert [peak < 0.85 * peaks[0] for peak in peaks[1:]] == [True, True], peaks


def test_a_loss_that_uses_no_large_leaf_or_one_twice_has_its_gradient() -> None:
    def loss(params: Any, batch: Any, key: Tensor) -> ft.Loss:
        tied = batch["x"] @ params["tied"]
        return ft.Loss(torch.sum(tied * tied) + torch.sum(params["tied"]), batch["x"].new_full((), 2.0), {})

    params = {"tied": draw(0, 128, 64), "unused": draw(1, 128, 64), "small": draw(2, 3)}
    tx, batch = ft.optim.sgd(0.1), {"x": draw(3, 4, 128)}
    state = ft.init_state(params, tx, key=KEY)
    before = tree.map(torch.clone, (state, batch))
    got, _ = ft.train_step(loss, tx, accumulate=2)(state, batch)
    grads = [ft.grad(loss)(params, {"x": rows}, KEY) for rows in batch["x"].chunk(2)]
    expected = tree.map(lambda p, a, b: p - 0.1 * (a + b) / 4, params, *grads)
    assert_close(got.params, expected)
    assert all(tree.leaves(tree.map(torch.equal, (state, batch), before)))


def test_large_leaves_compose_with_sweep_and_a_gradient_through_the_step() -> None:
    params, batch = [{"w": draw(0, 128, 128) / 12, "b": draw(1, 128)}], {"x": draw(2, 5, 128), "mask": draw(3, 5)}
    tx = ft.optim.inject_hyperparams(ft.optim.sgd)(learning_rate=0.1)
    state = ft.init_state(params, tx, key=KEY)
    whole, parts = ft.train_step(layered, tx), ft.train_step(layered, tx, accumulate=2)
    # 128 terms of about 1 in another order, in float64
    both = [ft.sweep(step, {"learning_rate": [0.1, 0.2]}) for step in (parts, whole)]
    after = [swept(swept.init(state), batch)[0].params for swept in both]
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10), *after)

    def moved(params: Any, step: Any) -> Tensor:
        return tree.norm(step(state._replace(params=params), batch)[0].params)

    tree.map(
        lambda a, b: torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10),
        *[ft.grad(lambda p, step=step: moved(p, step))(params) for step in (parts, whole)],
    )


def test_a_schedule_of_parts_neither_compiles_the_loss_again_nor_changes_the_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traced: list[int] = []
    programs = lowered(monkeypatch)

    def noting(params: Any, batch: Any, key: Tensor) -> ft.Loss:
        traced.append(len(batch["x"]))
        return squares(params, batch, key)

    params = {"w": draw(0, 3).float(), "b": draw(1).float()}
    tx = ft.optim.sgd(0.1, momentum=0.9)
    step = ft.compile(ft.train_step(noting, tx, accumulate_rows=2), donate=True)
    whole = ft.train_step(squares, tx)
    state = expected = ft.init_state(params, tx, key=KEY)
    state = tree.map(torch.clone, state)
    for t in range(6):
        parts = (1, 2, 4)[t // 2]  # the batch grows, the part does not
        batch = tree.cast(problem(10 * t, 2 * parts)[1], torch.float32) | {"mask": torch.ones(2 * parts)}
        state, metrics = step(state, batch)
        expected, wanted = whole(expected, batch)
        # float32 sums of 8 terms in another order, six times
        tree.map(
            lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6),
            (state.params, metrics),
            (expected.params, wanted),
        )
    # traced once for each size of the batch, not for each part, and compiled once for all
    assert traced == [2, 2, 2]
    assert [program.which for program in programs].count("backward") == 1


def test_multi_steps_with_a_schedule_of_parts_equals_accumulate_with_as_many() -> None:
    every = ft.schedules.piecewise_constant_schedule(2, {1: 2.0})  # two parts, and four after the first update
    tx = ft.optim.adamw(0.1)
    many = ft.optim.MultiSteps(tx, every, accumulator_dtype=torch.float64).gradient_transformation()
    step = ft.train_step(squares, many)
    state = ft.init_state(problem(0, 3)[0], many, key=KEY)
    expected = ft.init_state(problem(0, 3)[0], tx, key=KEY)
    for update, parts in enumerate((2, 4, 4)):
        rows = problem(update, 3 * parts)[1] | {"mask": torch.ones(3 * parts)}
        for i in range(parts):
            assert int(state.opt_state.gradient_step) == update
            state, _ = step(state, tree.map(lambda leaf, i=i: leaf[3 * i : 3 * i + 3], rows))
        expected, _ = ft.train_step(squares, tx, accumulate=parts)(expected, rows)
        # a mean of equal parts, in float64
        assert_close(state.params, expected.params)


@pytest.mark.parametrize("parts", [0, -1, 2.0, "2"])
def test_parts_below_one_or_no_integer_are_refused(parts: Any) -> None:
    with pytest.raises(ValueError, match=f"accumulate: expected parts >= 1, came {parts!r}"):
        ft.accumulate(ft.value_and_grad(squares), parts)


def test_what_grad_fn_takes_and_gives_is_told() -> None:
    params, batch = problem(0, 4)
    accumulated = ft.accumulate(ft.value_and_grad(squares), 2)
    assert_close(accumulated(params, batch, None)[1], accumulated(params, batch, KEY)[1])
    with pytest.raises(TypeError, match=r"expected \(params, batch, key\), came 2 arguments"):
        accumulated(params, batch)
    with pytest.raises(TypeError, match="pass value_and_grad"):
        ft.accumulate(ft.grad(squares), 2)(params, batch, KEY)


def test_more_parts_than_rows_are_refused() -> None:
    params, batch = problem(0, 3)
    with pytest.raises(ValueError, match="came 4 parts of 3 rows"):
        ft.accumulate(ft.value_and_grad(squares), 4)(params, batch, KEY)
    with pytest.raises(ValueError, match="came 2 parts of 0 rows"):
        ft.accumulate(ft.value_and_grad(squares), 2)(params, {}, KEY)


BAD: list[tuple[Any, str]] = [
    (torch.ones(4), "y: expected 3 rows as the first leaf has, came 4"),
    (torch.ones(0), "y: expected 3 rows as the first leaf has, came 0"),
    (torch.ones(()), r"y: expected a tensor of \(B, ...\) to cut in parts, came a tensor of shape \(\)"),
    ("text", r"y: expected a tensor of \(B, ...\) to cut in parts, came str 'text'"),
]


@pytest.mark.parametrize(("leaf", "message"), BAD)
def test_a_leaf_with_another_first_dimension_is_named(leaf: Any, message: str) -> None:
    params, batch = problem(0, 3)
    with pytest.raises(ValueError, match=f"accumulate: {message}"):
        ft.accumulate(ft.value_and_grad(squares), 2)(params, batch | {"y": leaf}, KEY)
