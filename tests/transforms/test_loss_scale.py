"""Laws of loss scaling: torch's GradScaler, scale for scale, and steps that are skipped whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import functrain as ft
from functrain import tree
from functrain.compiler import compilation

KEY = ft.random.key(0)
DYNAMIC = {"init_scale": 2.0**10, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 7}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def squares(params: Any, batch: Any, key: Tensor) -> ft.Loss:
    errors = torch.tanh(batch["x"] @ params["w"] + params["b"]) - batch["y"]  # (B,)
    mask = batch["mask"].to(errors.dtype)
    # `bad` is 1, or what makes the gradient of its row infinite
    return ft.Loss(torch.sum(mask * batch["bad"] * errors**2), torch.sum(mask), {})


def problem(rows: int = 6) -> tuple[Any, Any]:
    batch = {"x": draw(2, rows, 3), "y": draw(3, rows), "mask": torch.ones(rows), "bad": torch.ones(rows)}
    return {"w": draw(0, 3), "b": draw(1)}, batch


def optimizer() -> Any:
    rate = ft.schedules.linear_schedule(1e-2, 0.0, 300)
    return ft.optim.chain(ft.optim.clip_by_global_norm(0.1), ft.optim.adamw(rate))


@pytest.fixture(params=["eager", "whole", "piecewise"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(compilation, "_PIECEWISE_BYTES", 0 if request.param == "piecewise" else 2**62)
    return str(request.param)


def made(way: str, step: Any) -> Any:
    return step if way == "eager" else ft.compile(step, donate=True)


def clone(value: Any) -> Any:
    return tree.map(torch.clone, value)


def test_two_hundred_steps_equal_torchs_grad_scaler_scale_for_scale(way: str) -> None:
    overflows = set(torch.randint(200, (40,), generator=torch.Generator().manual_seed(0)).tolist())
    params, batch = problem()
    scale = ft.loss_scale.dynamic(**DYNAMIC)
    tx = ft.optim.chain(ft.optim.clip_by_global_norm(0.1), ft.optim.sgd(1e-2, momentum=0.9))
    # in pieces also in two parts, of which the second alone overflows
    accumulate = 2 if way == "piecewise" else 1
    step = made(way, ft.train_step(squares, tx, accumulate=accumulate, loss_scale=scale))
    state = ft.init_state(clone(params), tx, key=KEY, loss_scale=scale)

    theirs = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    sgd = torch.optim.SGD(theirs.values(), lr=1e-2, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", **DYNAMIC)
    for t in range(200):
        batch["bad"] = torch.tensor([1.0] * 5 + [torch.inf if t in overflows else 1.0])
        assert float(state.loss_scale.scale) == scaler.get_scale(), f"step {t}"
        state, metrics = step(state, batch)
        sgd.zero_grad()
        loss = squares(theirs, batch, KEY)
        scaler.scale(loss.total / loss.weight).backward()
        scaler.unscale_(sgd)
        torch.nn.utils.clip_grad_norm_(theirs.values(), 0.1)
        scaler.step(sgd)
        scaler.update()
        assert float(metrics["skipped"]) == (t in overflows)
        # float32 rounding of one step, 2**-24 relative, carried through up to 200 steps that contract
        tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6), state.params, theirs)
    assert float(state.loss_scale.scale) == scaler.get_scale()
    assert len(overflows) > 30 and int(state.step) == 200


# compiled in pieces and in a loop over parts: see GradScaler above
@pytest.mark.parametrize(
    ("way", "accumulate", "value"),
    [("eager", n, value) for n in (1, 3) for value in (torch.inf, -torch.inf, torch.nan)] + [("whole", 1, torch.nan)],
    indirect=["way"],
)
def test_a_step_that_is_not_finite_leaves_everything_but_step_and_scale(
    way: str, accumulate: int, value: float
) -> None:
    params, batch = problem(7)
    scale, tx = ft.loss_scale.dynamic(2.0**8, growth_interval=100), optimizer()
    step = made(way, ft.train_step(squares, tx, accumulate=accumulate, loss_scale=scale))
    state, _ = step(ft.init_state(params, tx, key=KEY, loss_scale=scale), batch)
    before = clone(state)
    # the last row: one part of three overflows, and the whole is skipped
    bad = batch | {"bad": torch.tensor([1.0] * 6 + [value])}
    state, metrics = step(state, bad)
    assert float(metrics["skipped"]) == 1.0 and float(metrics["loss_scale"]) == 2.0**8
    kept = (state.params, state.opt_state, state.key)
    assert all(tree.leaves(tree.map(torch.equal, kept, (before.params, before.opt_state, before.key))))
    assert int(state.step) == 2 and int(state.loss_scale.growth_count) == 0
    assert float(state.loss_scale.scale) == 2.0**7
    state, metrics = step(state, batch)
    assert float(metrics["skipped"]) == 0.0 and not torch.equal(state.params["w"], before.params["w"])


@settings(deadline=None, derandomize=True, max_examples=20)
@given(parts=st.integers(1, 7), exponent=st.integers(0, 15), mask=st.lists(st.sampled_from([0, 1]), min_size=7))
def test_a_power_of_two_changes_no_step(parts: int, exponent: int, mask: list[int]) -> None:
    params, batch = problem(7)
    batch["mask"] = torch.tensor([1, *mask[:6]]).float()
    scale, tx = ft.loss_scale.static(2.0**exponent), ft.optim.sgd(0.1)
    plain, metrics = ft.train_step(squares, tx)(ft.init_state(params, tx, key=KEY), batch)
    state = ft.init_state(params, tx, key=KEY, loss_scale=scale)
    scaled, measured = ft.train_step(squares, tx, accumulate=parts, loss_scale=scale)(state, batch)
    # float32 sums of 7 terms in another order
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6), plain.params, scaled.params)
    torch.testing.assert_close(measured["grad_norm"], metrics["grad_norm"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_float16_gradients_too_small_for_it_survive(accumulate: int) -> None:
    def tiny(params: Any, batch: Any, key: Tensor) -> ft.Loss:
        # the cotangent of each row is 2**-28 in float16, below its smallest number, 2**-24
        return ft.Loss(torch.sum((batch["x"] * params["w"]).float() * 2.0**-28), batch["x"].new_full((), 8.0), {})

    low, tx = ft.mixed_precision(tiny, "fp16"), ft.optim.sgd(1.0)
    params, batch = {"w": torch.ones(1)}, {"x": torch.ones(8, 1)}
    weight = 8.0 * accumulate  # every part counts 8
    expected = 8 * 2.0**-28 / weight
    plain, metrics = ft.train_step(low, tx, accumulate=accumulate)(ft.init_state(params, tx, key=KEY), batch)
    assert float(metrics["grad_norm"]) == 0.0
    scale = ft.loss_scale.static(2.0**16)
    state = ft.init_state(params, tx, key=KEY, loss_scale=scale)
    _, metrics = ft.train_step(low, tx, accumulate=accumulate, loss_scale=scale)(state, batch)
    assert float(metrics["grad_norm"]) == expected


def test_float16_params_get_float32_gradients() -> None:
    seen: list[torch.dtype] = []

    def init(params: Any) -> Any:
        return ()

    def update(grads: Any, state: Any, params: Any) -> Any:
        seen.extend(grad.dtype for grad in tree.leaves(grads))
        return tree.map(torch.zeros_like, params), state

    tx, scale = ft.optim.GradientTransformation(init, update), ft.loss_scale.static(4.0)
    params, batch = problem()
    state = ft.init_state(tree.cast(params, torch.float16), tx, key=KEY, loss_scale=scale)
    ft.train_step(ft.mixed_precision(squares, "fp16"), tx, loss_scale=scale)(state, batch)
    assert seen == [torch.float32, torch.float32]


def test_a_static_scale_stays_and_a_dynamic_one_stops_short_of_infinity() -> None:
    finite, not_finite = torch.tensor(True), torch.tensor(False)
    static = ft.loss_scale.static(3.0)
    assert float(static.update(static.init(), not_finite).scale) == 3.0
    dynamic = ft.loss_scale.dynamic(2.0**127, growth_interval=1)
    assert float(dynamic.update(dynamic.init(), finite).scale) == 2.0**127
    assert float(dynamic.update(dynamic.init(), not_finite).scale) == 2.0**126


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ft.loss_scale.static(0.0), "static: expected a positive finite scale in float32, came 0.0"),
        (lambda: ft.loss_scale.dynamic(float("inf")), "dynamic: expected a positive finite scale in float32, came inf"),
        (lambda: ft.loss_scale.static(1e39), r"static: expected a positive finite scale in float32, came 1e\+39"),
        (lambda: ft.loss_scale.dynamic(1e-46), "dynamic: expected a positive finite scale in float32, came 1e-46"),
        (lambda: ft.loss_scale.static("8"), "static: expected a positive finite scale in float32, came '8'"),  # type: ignore
        (lambda: ft.loss_scale.dynamic(growth_factor=1.0), "expected a finite growth_factor above 1, came 1.0"),
        (lambda: ft.loss_scale.dynamic(growth_factor=torch.inf), "expected a finite growth_factor above 1, came inf"),
        (lambda: ft.loss_scale.dynamic(growth_interval=2.5), "growth_interval of at least 1 step, came 2.5"),  # type: ignore
        (lambda: ft.loss_scale.dynamic(backoff_factor=1.0), r"expected backoff_factor in \(0, 1\), came 1.0"),
        (lambda: ft.loss_scale.dynamic(growth_interval=0), "expected growth_interval of at least 1 step, came 0"),
    ],
)
def test_a_scale_that_cannot_work_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_state_made_with_another_scale_is_refused() -> None:
    params, batch = problem()
    tx, scale = ft.optim.sgd(0.1), ft.loss_scale.static(2.0)
    with pytest.raises(ValueError, match="the state has no loss scale and the step one"):
        ft.train_step(squares, tx, loss_scale=scale)(ft.init_state(params, tx, key=KEY), batch)
    with pytest.raises(ValueError, match="the state has one loss scale and the step none"):
        ft.train_step(squares, tx)(ft.init_state(params, tx, key=KEY, loss_scale=scale), batch)


def test_a_scale_or_guard_of_another_kind_is_refused() -> None:
    params, batch = problem()
    tx, dynamic, static = ft.optim.sgd(0.1), ft.loss_scale.dynamic(), ft.loss_scale.static(2.0)
    guard = ft.train.skip_spikes
    for options in ({"loss_scale": 1024.0}, {"loss_scale": ft.loss_scale.dynamic}, {"guard": guard}):
        (name,) = options
        for call in (lambda o: ft.train_step(squares, tx, **o), lambda o: ft.init_state(params, tx, key=KEY, **o)):
            with pytest.raises(TypeError, match=rf"expected {name}=ft\..* or .*, came (float|function)"):
                call(options)
    for first, then in ((static, dynamic), (dynamic, static)):
        with pytest.raises(
            ValueError, match="expected a state whose loss scale has .*; give init_state and train_step"
        ):
            ft.train_step(squares, tx, loss_scale=then)(ft.init_state(params, tx, key=KEY, loss_scale=first), batch)
    with pytest.raises(ValueError, match=r"whose guard has .*'losses': \(8,\).*, came one with .*'losses': \(4,\)"):
        ft.train_step(squares, tx, guard=guard(8))(ft.init_state(params, tx, key=KEY, guard=guard(4)), batch)


def test_a_checkpoint_holds_scale_and_buffers(tmp_path: Any) -> None:
    params, batch = problem()
    tx, scale = optimizer(), ft.loss_scale.dynamic(2.0**9)
    buffers = {"mean": draw(5, 3), "count": torch.tensor(4)}
    state = ft.init_state(params, tx, key=KEY, loss_scale=scale, buffers=buffers)
    state = state._replace(loss_scale=scale.update(state.loss_scale, torch.tensor(False)))
    ft.checkpoint.save(tmp_path / "state", state)
    like = ft.init_state(params, tx, key=KEY, loss_scale=scale, buffers=tree.zeros_like(buffers))
    loaded = ft.checkpoint.load(tmp_path / "state", like=like)
    assert all(tree.leaves(tree.map(torch.equal, loaded, state))) and float(loaded.loss_scale.scale) == 2.0**8
