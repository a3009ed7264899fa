"""What some transformations declare, at any learning rate, and one that is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import functrain.optim as ours
from functrain import tree
from functrain.testing import laws, strategies

FLOATS = strategies.params(dtypes=[torch.float32])

# of a learning rate, and what they declare
OF_RATE: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "sgd": (lambda lr: ours.sgd(lr, 0.9, nesterov=True), {"leafwise": True, "descends": True, "differentiable": True}),
    "adam": (
        lambda lr: ours.adam(lr, eps_root=1e-6),
        {"leafwise": True, "debiased": True, "descends": True, "differentiable": True},
    ),
    "adamw": (lambda lr: ours.adamw(lr), {"leafwise": True, "debiased": True, "differentiable": True}),
    "lion": (lambda lr: ours.lion(lr, weight_decay=0.0), {"leafwise": True, "debiased": True, "descends": True}),
    "lamb": (lambda lr: ours.lamb(lr), {"leafwise": True, "debiased": True, "descends": True}),
    "adan": (lambda lr: ours.adan(lr), {"leafwise": True}),
    "rmsprop": (lambda lr: ours.rmsprop(lr), {"leafwise": True, "descends": True}),
    "ema": (lambda x: ours.ema(1 - x), {"leafwise": True, "debiased": True, "differentiable": True}),
}


@pytest.mark.parametrize("name", OF_RATE)
def test_it_keeps_what_it_declares_at_any_learning_rate(name: str) -> None:
    make, declared = OF_RATE[name]
    assert set(declared) < set(laws.check(make, compiled=False, examples=8, **declared))


@pytest.mark.parametrize(
    ("clip", "measure"),
    [
        (ours.clip(0.5), lambda updates: tree.norm(updates, ord="inf")),
        (ours.clip_by_global_norm(0.5), tree.norm),
        (ours.clip_by_block_rms(0.5), lambda updates: max(rms(leaf) for leaf in tree.leaves(updates))),
    ],
    ids=["clip", "clip_by_global_norm", "clip_by_block_rms"],
)
def test_a_clip_is_bounded(clip: Any, measure: Callable[[Any], Any]) -> None:
    laws.check(clip, bounded=(measure, 0.5), compiled=False, examples=10, params=FLOATS)


def rms(leaf: torch.Tensor) -> float:
    return float(torch.sqrt(torch.mean(leaf.double() ** 2))) if leaf.numel() else 0.0


def test_what_is_compiled_keeps_the_laws() -> None:
    params = {"b": torch.ones(3, dtype=torch.bfloat16), "w": torch.arange(6.0).reshape(2, 3) - 2}
    # the last bits of a short float: the compiler keeps in float32 what is between two operations
    mixed = ours.chain(ours.clip_by_global_norm(1.0), ours.adamw(0.1))
    assert laws.check(mixed, params=params, examples=2)[-1] == "compiled"
