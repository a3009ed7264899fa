"""Averages of parameters are those of torch and optax, and change no update."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from later import Later
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import functrain as ft
from functrain import tree

optax = Later("optax")

PARAMS = {"w": torch.arange(6.0).reshape(2, 3) - 2, "b": torch.ones(3)}


def steps(tx: Any, params: Any, count: int) -> tuple[list[Any], Any]:
    """Return the params after each step, and the last state."""
    state, seen = tx.init(params), []
    for i in range(count):
        grads = tree.map(lambda p, i=i: torch.sin(p.float() + i).to(p.dtype), params)
        updates, state = tx.update(grads, state, params)
        params = ft.optim.apply_updates(params, updates)
        seen.append(params)
    return seen, state


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


@pytest.mark.parametrize("wrapper", [lambda tx: ft.optim.keep_ema(tx, 0.9), lambda tx: ft.optim.keep_swa(tx, 2, 2)])
def test_the_updates_are_the_inner_ones(wrapper: Any) -> None:
    inner = ft.optim.adamw(0.1)
    ours, state = steps(wrapper(inner), PARAMS, 5)
    theirs, inner_state = steps(inner, PARAMS, 5)
    assert same(ours, theirs) and same(state.inner_state, inner_state)


def test_an_ema_equals_optax_ema_of_the_params() -> None:
    seen, state = steps(ft.optim.keep_ema(ft.optim.sgd(0.1), 0.9), PARAMS, 6)
    theirs = optax.ema(0.9)
    theirs_state = theirs.init(tree.map(torch.Tensor.numpy, PARAMS))
    for params in seen:
        expected, theirs_state = theirs.update(tree.map(torch.Tensor.numpy, params), theirs_state)
    for name, value in state.average.items():
        # float32: a few roundings a step, over a sum of 0.47
        np.testing.assert_allclose(value.numpy(), np.asarray(expected[name]), rtol=2e-6, atol=2e-6)
    first = steps(ft.optim.keep_ema(ft.optim.sgd(0.1), 0.9), PARAMS, 1)
    assert same(first[1].average, first[0][0])


class _Holder(torch.nn.Module):
    def __init__(self, params: Any) -> None:
        super().__init__()
        self.w, self.b = torch.nn.Parameter(params["w"].clone()), torch.nn.Parameter(params["b"].clone())


def test_an_ema_that_begins_at_the_first_params_equals_torchs() -> None:
    seen, state = steps(ft.optim.keep_ema(ft.optim.sgd(0.1), 0.9, debias=False), PARAMS, 6)
    theirs = AveragedModel(_Holder(PARAMS), multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(_Holder(PARAMS))  # the first one copies
    for params in seen:
        theirs.update_parameters(_Holder(params))
    assert tree.allclose(state.average, {"w": theirs.module.w, "b": theirs.module.b}, rtol=1e-6, atol=1e-6)


def test_swa_equals_torchs_mean_of_the_params_after_these_steps() -> None:
    tx = ft.optim.keep_swa(ft.optim.sgd(0.1), 3, 2)
    seen, state = steps(tx, PARAMS, 8)
    theirs = AveragedModel(_Holder(PARAMS))
    for step in (3, 5, 7):
        theirs.update_parameters(_Holder(seen[step - 1]))
    assert tree.allclose(state.average, {"w": theirs.module.w, "b": theirs.module.b}, rtol=1e-6, atol=1e-6)
    assert int(state.averaged) == 3
    early_seen, early = steps(tx, PARAMS, 2)
    assert same(early.average, early_seen[-1])


def test_a_decay_may_be_a_schedule() -> None:
    schedule = ft.schedules.ema_warmup(0.9, power=0.75)
    seen, state = steps(ft.optim.keep_ema(ft.optim.sgd(0.1), schedule, debias=False), PARAMS, 5)
    expected = PARAMS["w"].double()
    for count, params in enumerate(seen):
        decay = min(0.9, 1 - (1 + count) ** -0.75)
        expected = decay * expected + (1 - decay) * params["w"].double()
    torch.testing.assert_close(state.average["w"].double(), expected, rtol=1e-6, atol=1e-6)
    assert float(schedule(0)) == 0.0 and float(schedule(10**9)) == 0.9


@pytest.mark.parametrize("wrapper", [lambda tx: ft.optim.keep_ema(tx, 0.999), lambda tx: ft.optim.keep_swa(tx, 1)])
def test_averages_of_half_precision_params_are_float32_and_move(wrapper: Any) -> None:
    params = {"w": torch.ones(3, dtype=torch.bfloat16)}
    tx = wrapper(ft.optim.identity())
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update({"w": torch.full((3,), 0.0078125, dtype=torch.bfloat16)}, state, params)
        params = ft.optim.apply_updates(params, updates)
    # the params are 1 + 1, 2 and 3 128ths; a mean of them would be rounded to a 128th
    assert state.average["w"].dtype == torch.float32
    torch.testing.assert_close(state.average["w"], torch.full((3,), 1 + 2 / 128), rtol=0, atol=1e-4)


def test_what_is_no_floating_point_number_is_copied() -> None:
    params = {"w": torch.ones(2), "n": torch.tensor(3)}
    for tx in (ft.optim.keep_ema(ft.optim.sgd(1.0), 0.5), ft.optim.keep_swa(ft.optim.sgd(1.0), 1)):
        state = tx.init(params)
        for n in (4, 5):
            _, state = tx.update({"w": torch.ones(2), "n": None}, state, params | {"n": torch.tensor(n)})
        assert state.average["n"] == 5 and state.average["n"].dtype == torch.int64


def test_what_is_no_decay_or_step_is_told() -> None:
    for decay in (1.0, -0.1):
        with pytest.raises(ValueError, match=r"keep_ema: decay must be in \[0, 1\)"):
            ft.optim.keep_ema(ft.optim.sgd(0.1), decay)
    for options in ({"start": 0}, {"start": 1, "every": 0}):
        with pytest.raises(ValueError, match="keep_swa: expected (start|every) of at least 1 step, came 0"):
            ft.optim.keep_swa(ft.optim.sgd(0.1), **options)
    with pytest.raises(ValueError, match="keep_ema needs the current params"):
        tx = ft.optim.keep_ema(ft.optim.sgd(0.1))
        tx.update(PARAMS, tx.init(PARAMS))
