"""What a step is made of, and what it takes a loss for, and a state."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Generic, NamedTuple

import torch
from torch import Tensor

from functrain import tree
from functrain.losses import Loss
from functrain.optim import GradientTransformation
from functrain.sharding import Plan
from functrain.sharding.pieces import is_split
from functrain.train import checks
from functrain.train.protocols import Batch_contra
from functrain.train.state import TrainState
from functrain.tree import Tree

Metrics = dict[str, Tensor]


class OptimizerStep(Generic[Batch_contra]):
    """A step, `second(state, first(state, batch))`, that says which optimizer's state it keeps."""

    def __init__(
        self,
        first: Callable[..., Any],
        second: Callable[[Any, Any], Any],
        optimizer: GradientTransformation,
        plan: Plan | None = None,
    ) -> None:
        self.plan: Plan | None = plan
        self.first: Callable[..., Any] = first
        self.second: Callable[[Any, Any], Any] = second
        self.optimizer: GradientTransformation = optimizer

    def __call__(self, state: TrainState, batch: Batch_contra) -> tuple[TrainState, Metrics]:
        return self.second(state, self.first(state, batch))


class Found(NamedTuple):
    """What the first stage of a step hands to the second."""

    loss: Loss
    buffers: Tree
    grads: Tree  # of total / weight times the scale where `divided`, of total times the scale elsewhere


def divisor_of(weight: Tensor) -> Tensor:
    """Return what one slice's gradient is divided by under a loss scale."""
    # near the weight, so that the quotient is of the size of a mean; a slice whose mask is all zero has none, and a
    # total of 0, and by less than this the sum of other slices would overflow
    return torch.where(weight == 0, 1.0, weight.abs().clamp(min=1e-6))


def loss_of(result: Any, looped: bool, taken: Collection[str]) -> Loss:
    if isinstance(result, Loss):
        if not isinstance(result.weight, Tensor) or result.weight.dim() != 0:
            came = tuple(result.weight.shape) if isinstance(result.weight, Tensor) else repr(result.weight)
            raise TypeError(
                f"train_step: expected a Loss whose weight is a () tensor, came {came}; write torch.sum(mask), or "
                "total.new_tensor(count)"
            )
        return result._replace(metrics=checks.metrics("train_step", result.metrics, taken))
    value, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if not isinstance(value, Tensor):
        raise TypeError(
            f"train_step: expected loss_fn to return a Loss, a tensor, or (tensor, dict of metrics), came {result!r}"
        )
    if looped:
        raise TypeError(
            "train_step: expected loss_fn to return a Loss where slices of the batch are added, came a tensor, whose "
            "weight nobody knows: the mean of a slice with few rows or a mask would count as much as any other; return "
            "ft.Loss(sum of the losses, how many they are, {})"
        )
    return Loss(value, torch.ones((), device=value.device), checks.metrics("train_step", metrics, taken))


def check_state(state: TrainState, begun: dict[str, Tree], buffers: bool, planned: bool) -> None:
    if not isinstance(state, TrainState):
        raise TypeError(
            f"train_step: expected (state, batch) with a state of init_state, came {type(state).__name__} first"
        )
    for name, ours in begun.items():
        theirs, words = getattr(state, name), name.replace("_", " ")
        if (theirs is None) != (ours is None):
            there, here = ("no", "one") if theirs is None else ("one", "none")
            raise ValueError(
                f"train_step: the state has {there} {words} and the step {here}; give init_state and "
                f"train_step the same {name}"
            )
        if _fields(theirs) != _fields(ours):
            raise ValueError(
                f"train_step: expected a state whose {words} has {_fields(ours)}, came one with {_fields(theirs)}; "
                f"give init_state and train_step the same {name}"
            )
    for path, leaf in [] if planned else tree.items(state.params):
        if is_split(leaf):
            raise TypeError(
                f"train_step: the params' {path} is split over ranks, and the step has no plan; pass plan= as to "
                "plan.shard(params)"
            )
    if not buffers and tree.leaves(state.buffers):
        raise ValueError(
            "train_step: the state has buffers that the step does not update; pass buffers=True, and take them as the "
            "second argument of loss_fn"
        )


def _fields(state: Tree) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in tree.items(state)}
