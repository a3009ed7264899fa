"""Any legal plan is no plan, whatever is drawn; and what is broken, in a loss or in the library, is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import functrain as ft
from functrain.models import gpt2, llama
from functrain.sharding import collectives
from functrain.sharding.plan import Plan
from functrain.testing import assert_same_under_plan
from functrain.testing.strategies import plans

GPT = gpt2.Config(vocab=16, context=4, layers=2, heads=4, width=8, attention="math", dropout=0.1)
LLAMA = llama.Config(vocab=16, context=4, layers=2, heads=4, width=8, inner=8, attention="math", tied=True)
TOKENS = ft.random.randint(ft.random.key(4), (8, 4), 0, 16)
BATCH = {"tokens": TOKENS, "targets": TOKENS.roll(1, 1), "mask": TOKENS > 3}
GPT_PARAMS = gpt2.init(GPT, ft.random.key(1))


def gpt_loss(params: Any, batch: Any, key: Any) -> ft.Loss:
    hidden = gpt2.hidden(params, batch["tokens"], GPT, key=key)
    return ft.losses.next_token_from_hidden(hidden, params["wte"], batch["targets"], batch["mask"])


def llama_loss(params: Any, batch: Any, key: Any) -> ft.Loss:
    return ft.losses.next_token(llama.apply(params, batch["tokens"], LLAMA), batch["targets"], batch["mask"])


# a failing plan is short enough to read, and takes minutes to make shorter
settings.register_profile(
    "plans", deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow]
)
drawn = settings(settings.get_profile("plans"), max_examples=3)


@drawn
@given(plans(GPT_PARAMS, sharding=gpt2.sharding), st.sampled_from([1, 2]))
def test_any_plan_of_a_gpt_is_no_plan(plan: Any, accumulate: int) -> None:
    assert_same_under_plan(gpt_loss, GPT_PARAMS, BATCH, plan, accumulate=accumulate, steps=1)


@drawn
@given(plans(llama.init(LLAMA, ft.random.key(2)), max_ranks=2), st.booleans())
def test_any_plan_of_a_llama_is_no_plan(plan: Any, recompute: bool) -> None:
    loss_fn = ft.recompute_layers(llama_loss) if recompute else llama_loss
    assert_same_under_plan(loss_fn, llama.init(LLAMA, ft.random.key(2)), BATCH, plan, steps=1)


PARAMS = {"in": torch.linspace(-1, 1, 12).view(4, 3), "out": torch.linspace(-1, 2, 3)}
ROWS = {"x": torch.linspace(-2, 3, 32).view(8, 4).sin(), "mask": torch.arange(8) % 3 > 0}
FSDP = {"mesh": {"fsdp": 2}, "params": [("in", ft.sharding.P("fsdp")), ("out", ft.sharding.P())]}


def loss_fn(params: Any, batch: Any, key: Any) -> ft.Loss:
    wrong = (torch.tanh(batch["x"] @ params["in"]) @ params["out"] - 1) ** 2
    mask = batch["mask"]
    return ft.Loss((wrong * mask).sum(), mask.sum().to(wrong.dtype), {"wrong": (wrong * mask).sum()})


@settings(settings.get_profile("plans"), max_examples=10)
@given(plans(PARAMS))
def test_any_plan_of_a_network_is_no_plan(plan: Any) -> None:
    assert_same_under_plan(loss_fn, PARAMS, ROWS, plan)


def test_an_axis_of_one_rank_splits_nothing() -> None:
    plan = {"mesh": {"data": 1, "fsdp": 2}, "params": [("in", ft.sharding.P("fsdp", "data")), ("**", ft.sharding.P())]}
    assert_same_under_plan(loss_fn, PARAMS, ROWS, plan)
    plan = {"mesh": {"data": 2, "tensor": 1}, "params": gpt2.sharding(tensor="tensor"), "tensor": "tensor"}
    assert_same_under_plan(gpt_loss, GPT_PARAMS, BATCH, plan | {"stream": True}, steps=1)


def mean_of_rank(params: Any, batch: Any, key: Any) -> ft.Loss:
    found = loss_fn(params, batch, key)
    return ft.Loss(found.total / found.weight, found.weight / found.weight, {})


def by_place(params: Any, batch: Any, key: Any) -> ft.Loss:
    """Weigh rows by where they lie."""
    weights = torch.arange(len(batch["x"])).double()
    return loss_fn(params, {"x": batch["x"] * weights[:, None], "mask": batch["mask"]}, key)


def centred(params: Any, batch: Any, key: Any) -> ft.Loss:
    """Take the rows' own mean away."""
    return loss_fn(params, {"x": batch["x"] - batch["x"].mean(0), "mask": batch["mask"]}, key)


@pytest.mark.parametrize("wrong", [mean_of_rank, by_place, centred])
def test_a_loss_that_means_something_else_on_ranks_is_found(wrong: Any) -> None:
    with pytest.raises(AssertionError, match=r"step 0 is not that of one process:\n  .* on rank 0: off by"):
        assert_same_under_plan(wrong, PARAMS, ROWS, FSDP)


def test_rules_that_a_layer_does_not_know_are_found() -> None:
    plan = FSDP | {"mesh": {"tensor": 2}, "params": [("in", ft.sharding.P("tensor")), ("out", ft.sharding.P())]}
    with pytest.raises(RuntimeError, match="sharding: in stays split along tensor"):
        assert_same_under_plan(loss_fn, PARAMS, ROWS, plan | {"tensor": "tensor"})


def forget(plan: Plan, grads: Any, spread: Any) -> Any:
    return grads


def twice(sums: Any) -> Any:
    return lambda plan, grads, spread: sums(plan, sums(plan, grads, spread), spread)


MUTANTS = {
    "a sum of gradients that is forgotten": lambda patch: patch.setattr(Plan, "sum_gradients", forget),
    "one that is taken twice": lambda patch: patch.setattr(Plan, "sum_gradients", twice(Plan.sum_gradients)),
    "a gather whose transpose is its own part": lambda patch: patch.setitem(collectives._TRANSPOSED, "gather", "own"),
    "a rank's own weight": lambda patch: patch.setattr(Plan, "sum", lambda plan, values: values),
    "keys of the first rank": lambda patch: patch.setattr(Plan, "place", lambda plan, like: torch.zeros((), dtype=int)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_library_that_is_broken_is_found(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[mutant](monkeypatch)

    def drawing(params: Any, batch: Any, key: Any) -> ft.Loss:
        return loss_fn(params, batch | {"x": ft.nn.dropout(batch["x"], 0.5, key)}, key)

    with pytest.raises(AssertionError, match="is not that of one process"):
        assert_same_under_plan(drawing, PARAMS, ROWS, FSDP)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"mask: expected rows that divide into 2 ranks of 3 slices, came \(8,\)"):
        assert_same_under_plan(loss_fn, PARAMS, ROWS, FSDP, accumulate=3)
    with pytest.raises(ValueError, match="expected an axis of the mesh fsdp=2, came 'data'"):
        assert_same_under_plan(loss_fn, PARAMS, ROWS, FSDP | {"params": [("**", ft.sharding.P("data"))]})
