"""`laws.check_step`: a sound step passes, and a faulty one is found by the law that its fault is against."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import functrain as ft
from functrain import tree
from functrain.testing import laws

BATCH = {"x": torch.arange(15.0).reshape(5, 3) / 10, "y": torch.arange(5.0), "mask": torch.tensor([1, 1, 0, 1, 1.0])}
PARAMS = {"w": torch.tensor([0.3, -0.2, 0.1]), "b": torch.tensor(0.5)}
OPTIMIZER = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(0.1))


def loss_fn(params: Any, batch: Any, key: Tensor) -> ft.Loss:
    squares = (batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2 * batch["mask"]
    return ft.Loss(squares.sum(), batch["mask"].sum(), {})


def mean_of_each_slice(params: Any, batch: Any, key: Tensor) -> ft.Loss:
    return ft.Loss(torch.mean((batch["x"] @ params["w"] - batch["y"]) ** 2), torch.tensor(1.0), {})


def start() -> ft.TrainState:
    return ft.init_state(PARAMS, OPTIMIZER, key=ft.random.key(0))


def split_of(loss: Any) -> Any:
    return lambda parts: ft.train_step(loss, OPTIMIZER, accumulate=parts)


def test_a_sound_step_keeps_every_law_and_its_state_stays() -> None:
    state = start()
    asked = laws.check_step(ft.train_step(loss_fn, OPTIMIZER), state, BATCH, split=split_of(loss_fn))
    assert asked == list(laws.STEP_LAWS)
    ft.testing.assert_trees_equal(state, start())
    with pytest.raises(ValueError, match="came \\['pure'\\]; there are pure_step"):
        laws.check_step(ft.train_step(loss_fn, OPTIMIZER), state, BATCH, without=["pure"])


def test_a_step_that_accumulates_and_one_with_random_numbers_keep_them() -> None:
    def noisy(params: Any, batch: Any, key: Tensor) -> ft.Loss:
        noise = 1 + 0.1 * ft.random.normal(key, tuple(batch["y"].shape))
        return loss_fn(params, {**batch, "mask": batch["mask"] * noise}, key)

    for step in (ft.train_step(noisy, OPTIMIZER), ft.train_step(loss_fn, OPTIMIZER, accumulate=2)):
        assert "traced_step" in laws.check_step(step, start(), BATCH, compiled=False)


calls: list[Any] = []


def counts_its_calls(state: Any, batch: Any) -> Any:
    calls.append(state)
    return state._replace(step=state.step + 1, params=tree.scale(1 / len(calls), state.params)), {}


def writes_to_the_batch(state: Any, batch: Any) -> Any:
    batch["x"].mul_(2)
    return state._replace(step=state.step + 1), {}


def forgets_to_count(state: Any, batch: Any) -> Any:
    return state._replace(params=tree.scale(0.5, state.params)), {}


def lengthens_params(state: Any, batch: Any) -> Any:
    return state._replace(step=state.step + 1, params=tree.cast(state.params, torch.float64)), {}


def uses_what_no_tensor_holds(state: Any, batch: Any) -> Any:
    count = getattr(state.params["w"], "count", 0) + 1
    new = tree.scale(1 / count, state.params)
    new["w"].count = count
    return state._replace(step=state.step + 1, params=new), {}


def looks_at_the_loss(state: Any, batch: Any) -> Any:
    factor = 0.5 if float(batch["x"].sum()) > 0 else 1.0
    return state._replace(step=state.step + 1, params=tree.scale(factor, state.params)), {}


def loses_digits(state: Any, batch: Any) -> Any:
    w = state.params["w"].bfloat16()
    return state._replace(step=state.step + 1, params={**state.params, "w": ((w + 300) - 300).float()}), {}


MUTANTS = [
    ("pure_step", counts_its_calls, ""),
    ("pure_step", writes_to_the_batch, "x"),
    ("kept_step", forgets_to_count, ""),
    ("kept_step", lengthens_params, "params/b"),
    ("resumed_step", uses_what_no_tensor_holds, "0/params/b"),
    ("traced_step", looks_at_the_loss, ""),
    ("donated_step", loses_digits, "0/params/w"),
]


@pytest.mark.parametrize(("law", "mutant", "path"), MUTANTS, ids=lambda value: getattr(value, "__name__", None))
def test_the_law_finds_the_mutant(law: str, mutant: Any, path: str) -> None:
    calls.clear()
    batch = tree.map(torch.clone, BATCH)
    with pytest.raises(laws.LawError) as caught:
        laws.check_step(mutant, start(), batch, compiled=law == "donated_step")
    assert caught.value.law == law, str(caught.value)
    assert not path or caught.value.path == path, str(caught.value)


def test_a_mean_of_each_slice_is_found_and_every_law_finds_one() -> None:
    step = ft.train_step(mean_of_each_slice, OPTIMIZER)
    with pytest.raises(
        laws.LawError, match="'split_step' is broken: Slices of a batch(.|\n)*in 2 slices(.|\n)*a Loss: sums"
    ):
        laws.check_step(step, start(), BATCH, split=split_of(mean_of_each_slice), compiled=False)
    assert {law for law, _, _ in MUTANTS} | {"split_step"} == set(laws.STEP_LAWS)


def test_the_page_lists_every_law() -> None:
    page = (Path(__file__).parents[2] / "docs" / "testing.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE)
    assert rows == [(law.name, law.sentence) for law in [*laws.LAWS.values(), *laws.STEP_LAWS.values()]]
