"""The averaged params of a state are part of it: saved, compiled, swept, and left by a step that is skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import functrain as ft
from functrain import checkpoint, tree

KEY = ft.random.key(0)


def loss_fn(params: Any, batch: Any, key: Any) -> ft.Loss:
    errors = batch["x"] @ params["w"] + params["b"] - batch["y"]
    return ft.Loss(torch.sum(errors**2), errors.new_full((), len(errors)), {})


def batch(number: int) -> Any:
    x = ft.random.normal(ft.random.key(number), (4, 3))
    return {"x": x, "y": x.sum(1)}


def start(tx: Any, **options: Any) -> Any:
    return ft.init_state({"w": torch.ones(3) * 0.1, "b": torch.zeros(())}, tx, key=KEY, **options)


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


def after(step: Any, state: Any, numbers: Any) -> Any:
    for number in numbers:
        state, _ = step(state, batch(number))
    return state


EMA = ft.optim.keep_ema(ft.optim.adam(0.1), 0.8)


def test_the_average_of_a_run_is_that_of_its_params() -> None:
    step, state, expected, weight = ft.train_step(loss_fn, EMA), start(EMA), torch.zeros(3), 0.0
    for number in range(5):
        state, _ = step(state, batch(number))
        expected, weight = 0.8 * expected + 0.2 * state.params["w"], 0.8 * weight + 0.2
    # float32: a few roundings a step
    torch.testing.assert_close(ft.train.averaged(state)["w"], expected / weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tx", [EMA, ft.optim.keep_swa(ft.optim.sgd(0.1), 2)], ids=["ema", "swa"])
def test_a_compiled_donated_step_and_one_that_was_saved_keep_the_average(tx: Any, tmp_path: Path) -> None:
    step = ft.train_step(loss_fn, tx)
    whole = after(step, start(tx), range(4))
    checkpoint.save(tmp_path / "state", after(step, start(tx), range(2)))
    resumed = after(step, checkpoint.load(tmp_path / "state", like=start(tx)), range(2, 4))
    assert same(resumed, whole)
    compiled = after(ft.compile(step, donate=True), start(tx), range(4))
    # a fused kernel may contract a * b + c into one rounding
    assert tree.allclose(ft.train.averaged(compiled), ft.train.averaged(whole), rtol=1e-5, atol=1e-6)


def test_a_skipped_step_leaves_the_average() -> None:
    guard = ft.train.skip_nonfinite()
    step, state = ft.train_step(loss_fn, EMA, guard=guard), start(EMA, guard=guard)
    state, _ = step(state, batch(0))
    bad, metrics = step(state, batch(1) | {"y": torch.full((4,), torch.nan)})
    assert float(metrics["skipped"]) == 1.0 and same(bad.opt_state, state.opt_state)


def test_lanes_of_a_sweep_have_their_own_averages() -> None:
    for make in (
        lambda learning_rate: ft.optim.keep_ema(ft.optim.adam(learning_rate), 0.8),
        lambda learning_rate: ft.optim.schedule_free_sgd(learning_rate),
    ):
        tx = ft.optim.inject_hyperparams(make)(learning_rate=0.1)
        step = ft.train_step(loss_fn, tx)
        swept = ft.sweep(step, {"learning_rate": [0.1, 0.02]})
        states = swept.init(start(tx))
        for number in range(3):
            states, _ = swept(states, batch(number))
        for lane, rate in enumerate((0.1, 0.02)):
            alone = ft.optim.inject_hyperparams(make)(learning_rate=rate)
            expected = ft.train.averaged(after(ft.train_step(loss_fn, alone), start(alone), range(3)))
            found = swept.lane(ft.train.averaged(states), lane)
            assert tree.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_average_of_schedule_free_is_its_evaluation_params() -> None:
    tx = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.schedule_free_adamw(0.1))
    state = after(ft.train_step(loss_fn, tx), start(tx), range(3))
    expected = ft.optim.schedule_free_eval_params(state.opt_state[1], state.params)
    assert same(ft.train.averaged(state), expected) and not same(expected, state.params)


def test_what_is_masked_out_is_the_param_itself_and_dtypes_are_those_of_params() -> None:
    tx = ft.optim.masked(EMA, {"w": True, "b": False})
    state = ft.init_state({"w": torch.ones(3, dtype=torch.bfloat16), "b": torch.zeros(())}, tx, key=KEY)
    found = ft.train.averaged(state)
    assert found["b"] is state.params["b"] and found["w"].dtype == torch.bfloat16


def test_a_state_without_an_average_or_with_two_is_told() -> None:
    with pytest.raises(ValueError, match="expected one average of params.*came none; make the optimizer by ft"):
        ft.train.averaged(start(ft.optim.sgd(0.1)))
    with pytest.raises(ValueError, match="came 'opt_state', 'opt_state/inner_state'; keep one"):
        ft.train.averaged(start(ft.optim.keep_swa(EMA, 1)))
    with pytest.raises(TypeError, match="expected a state of init_state, came dict"):
        ft.train.averaged({})  # type: ignore[arg-type]
