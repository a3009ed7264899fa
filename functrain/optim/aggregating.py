"""Transformations of the gradients of single examples: what becomes one gradient, and what is known of their spread.

B examples, along `per_elt_dim` of every leaf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.combining import chain
from functrain.optim.numerics.safe import zero_count
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    OptState,
    Updates,
    identity,
    init_empty_state,
    with_extra_args_support,
)
from functrain.optim.variance_tracking import (
    PerElementMeanAndVarianceEMAState,
    get_unbiased_mean_and_variance_ema,
    track_per_element_mean_and_variance_with_ema,
)
from functrain.schedules import Scalar
from functrain.tree import Params, Tree, elsewhere

__all__ = [
    "AccumulateAvgUpdatesState", "Aggregator", "AggregatorUpdateFn", "PerElementMeanAndSumSqDiffGradsState",
    "PerElementMeanAndVarianceEMAState", "accumulate_avg_updates", "add_mean_variance_to_opt",
    "average_incrementally_updates", "average_per_element_updates", "get_batch_size_from_per_elt_updates",
    "get_per_element_mean_and_sum_sq_diff_grads", "get_unbiased_mean_and_variance_ema", "process",
    "track_per_element_mean_and_variance_with_ema",
]  # fmt: skip

Dims: TypeAlias = int | Sequence[int]


class AggregatorUpdateFn(Protocol):
    """Turn updates of single examples into one: (updates (B, ...), state, params) to (updates (...), state)."""

    def __call__(
        self, per_elt_updates: Updates, state: OptState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, OptState]: ...


class Aggregator(GradientTransformationExtraArgs):
    """A transformation whose updates come with a dimension of examples, and go without it."""


def process(
    preprocessor: GradientTransformation,
    aggregator: GradientTransformation,
    postprocessor: GradientTransformation,
    aggregator_has_aux: bool = False,
) -> GradientTransformationExtraArgs:
    """Transform updates of single examples, make one of them, and transform that.

    While the aggregator's state has a field `ready` that is false, updates are zero and the postprocessor's state
    stays. With `aggregator_has_aux` the aggregator returns (updates, keyword arguments for the postprocessor).
    Equals `optax.experimental.aggregating.process`. The result is an `Aggregator` when `aggregator` is one.

    >>> tx = ft.optim.aggregating.process(ft.optim.clip(1), ft.optim.stateless(lambda g, _: g.mean(0)), ft.optim.sgd(1))
    >>> tx.update(torch.tensor([[9.0], [0.5]]), tx.init(torch.zeros(1)))[0]  # clipped to 1 and 0.5, then averaged
    tensor([-0.7500])
    """
    before, between, after = (with_extra_args_support(tx) for tx in (preprocessor, aggregator, postprocessor))

    def init(params: Params) -> tuple[OptState, OptState, OptState]:
        return before.init(params), between.init(params), after.init(params)

    def update(
        updates: Updates, state: tuple[OptState, OptState, OptState], params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, tuple[OptState, OptState, OptState]]:
        first, second, third = state
        updates, first = before.update(updates, first, params, **extra_args)
        updates, second = between.update(updates, second, params, **extra_args)
        if aggregator_has_aux:
            updates, more = updates
            extra_args |= more
        ready = tree.get(second, "ready")
        new, last = after.update(updates, third, params, **extra_args)
        if ready is not None:
            new, last = tree.where(ready, (new, last), (tree.zeros_like(new), third))
        return new, (first, second, last)

    kind = Aggregator if isinstance(aggregator, Aggregator) else GradientTransformationExtraArgs
    return kind(init, update)


def average_per_element_updates(per_elt_dim: Dims = 0) -> Aggregator:
    """Make one update of those of single examples: their mean.

    >>> ft.optim.aggregating.average_per_element_updates().update(torch.tensor([[1.0], [4.0]]), ())[0]
    tensor([2.5000])
    """

    def update(updates: Updates, state: OptState, params: Params | None = None, **_: Any) -> tuple[Updates, OptState]:
        return tree.map(lambda x: torch.mean(x, _tuple(per_elt_dim)), updates), state

    return Aggregator(init_empty_state, update)


class AccumulateAvgUpdatesState(NamedTuple):
    micro_step: Tensor  # (), int64: updates since the last that was passed on
    ready: Tensor  # (), bool: this update was passed on
    avg_grad: Updates  # like params: their mean


def accumulate_avg_updates(accumulation_steps: int) -> GradientTransformation:
    """Pass on the mean of `accumulation_steps` updates, and zeros until there are as many.

    Raises: ValueError for less than one.

    >>> tx = ft.optim.aggregating.accumulate_avg_updates(2)
    >>> tx.update(torch.tensor([1.0]), tx.init(torch.zeros(1)))[0]  # the mean comes with the second update
    tensor([0.])
    """
    if accumulation_steps < 1:
        raise ValueError(f"accumulate_avg_updates: expected at least 1 accumulation step, came {accumulation_steps}")
    if accumulation_steps == 1:
        return identity()

    def init(params: Params) -> AccumulateAvgUpdatesState:
        count = zero_count(params)
        return AccumulateAvgUpdatesState(count, count.bool(), tree.zeros_like(params))

    def update(
        updates: Updates, state: AccumulateAvgUpdatesState, params: Params | None = None
    ) -> tuple[Updates, AccumulateAvgUpdatesState]:
        count = state.micro_step + 1
        mean = tree.map(lambda u, a: a + (u - a) / count, updates, state.avg_grad)
        return _emitted(count == accumulation_steps, mean, AccumulateAvgUpdatesState, count, mean)

    return GradientTransformation(init, update)


def average_incrementally_updates(per_elt_dim: Dims | None, accumulation_steps: int) -> GradientTransformation:
    """Average over examples, unless `per_elt_dim` is None, and over `accumulation_steps` updates.

    >>> tx = ft.optim.aggregating.average_incrementally_updates(per_elt_dim=0, accumulation_steps=1)
    >>> tx.update(torch.tensor([[1.0], [4.0]]), tx.init(torch.zeros(1)))[0]
    tensor([2.5000])
    """
    over_steps = accumulate_avg_updates(accumulation_steps)
    if per_elt_dim is None:
        return over_steps
    both = chain(average_per_element_updates(per_elt_dim), over_steps)
    return Aggregator(both.init, both.update)


def get_batch_size_from_per_elt_updates(per_elt_updates: Updates, per_elt_dim: Dims) -> int:
    """Return the number of examples that updates are of.

    Raises: ValueError when leaves disagree.

    >>> ft.optim.aggregating.get_batch_size_from_per_elt_updates({"w": torch.ones(8, 3, 2), "b": torch.ones(8, 2)}, 0)
    8
    """
    sizes = {path: math.prod(x.shape[d] for d in _tuple(per_elt_dim)) for path, x in tree.items(per_elt_updates)}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"updates of single examples: expected one number of examples, came {sizes}; stack as many")
    return next(iter(sizes.values()))


class PerElementMeanAndSumSqDiffGradsState(NamedTuple):
    micro_step: Tensor  # (), int64: updates since the last that was passed on
    ready: Tensor  # (), bool: this update was passed on
    mean_grads: Updates  # like params: mean over examples
    sum_sq_diff_grads: Updates  # like params: sum of squared differences from the mean


def get_per_element_mean_and_sum_sq_diff_grads(per_elt_dim: Dims = 0, accumulation_steps: int = 1) -> Aggregator:
    """Return the mean over examples, and as auxiliary output `sum_sq_diff_grads` and the `sample_size` B.

    Both over `accumulation_steps` updates, if there are several, by the formula that joins two samples.
    Source: Chan, Golub and LeVeque 1983, Algorithms for computing the sample variance.

    >>> ft.optim.aggregating.get_per_element_mean_and_sum_sq_diff_grads().update(torch.tensor([1.0, 2.0, 4.5]), ())[0]
    (tensor(2.5000), {'sum_sq_diff_grads': tensor(6.5000), 'sample_size': 3})
    """

    def of_batch(updates: Updates) -> tuple[Updates, Updates, int]:
        dims = _tuple(per_elt_dim)
        mean = tree.map(lambda x: torch.mean(x, dims), updates)
        squares = tree.map(lambda x: torch.sum((x - torch.mean(x, dims, keepdim=True)) ** 2, dims), updates)
        return mean, squares, get_batch_size_from_per_elt_updates(updates, per_elt_dim)

    def once(updates: Updates, state: OptState, params: Params | None = None, **_: Any) -> tuple[Any, OptState]:
        mean, squares, size = of_batch(updates)
        return (mean, {"sum_sq_diff_grads": squares, "sample_size": size}), state

    if accumulation_steps == 1:
        return Aggregator(init_empty_state, once)

    def init(params: Params) -> PerElementMeanAndSumSqDiffGradsState:
        count, zeros = zero_count(params), tree.zeros_like(params)
        return PerElementMeanAndSumSqDiffGradsState(count, count.bool(), zeros, zeros)

    def update(
        updates: Updates, state: PerElementMeanAndSumSqDiffGradsState, params: Params | None = None, **_: Any
    ) -> tuple[Any, PerElementMeanAndSumSqDiffGradsState]:
        mean, squares, size = of_batch(updates)
        count = state.micro_step + 1
        gap = tree.sub(mean, state.mean_grads)
        mean = tree.map(lambda a, d: a + d / count, state.mean_grads, gap)
        weight = state.micro_step * size / count
        squares = tree.map(lambda a, s, d: a + s + d**2 * weight, state.sum_sq_diff_grads, squares, gap)
        out = (mean, {"sum_sq_diff_grads": squares, "sample_size": size * count})
        kind = PerElementMeanAndSumSqDiffGradsState
        return _emitted(count == accumulation_steps, out, kind, count, mean, squares)

    return Aggregator(init, update)


def add_mean_variance_to_opt(
    opt: GradientTransformation, ema_decay: Scalar = 0.9, per_elt_dim: Dims = 0, accumulation_steps: int = 1
) -> GradientTransformationExtraArgs:
    """Make an optimizer that takes gradients of single examples, and keeps moving averages of their mean and variance.

    Equals `optax.experimental.aggregating.add_mean_variance_to_opt`.

    >>> opt = ft.optim.aggregating.add_mean_variance_to_opt(ft.optim.sgd(0.1))
    >>> opt.update(torch.tensor([1.0, 2.0, 4.5]), opt.init(torch.tensor(0.0)))[0]
    tensor(-0.2500)
    """
    return process(
        identity(),
        get_per_element_mean_and_sum_sq_diff_grads(per_elt_dim, accumulation_steps),
        chain(track_per_element_mean_and_variance_with_ema(ema_decay), opt),
        aggregator_has_aux=True,
    )


def _emitted(ready: Tensor, out: Tree, kind: Any, count: Tensor, *means: Tree) -> tuple[Any, Any]:
    """Return `out` and a state that starts again where ready, else zeros and the state as it is."""
    zeros = tree.zeros_like((out, kind(count, ready, *means)))
    started = zeros[1]._replace(ready=torch.ones_like(ready))
    going = kind(count, torch.zeros_like(ready), *means)
    return tree.where(ready, (out, started), (zeros[0], going))


def _tuple(dims: Dims) -> tuple[int, ...]:
    return (dims,) if isinstance(dims, int) else tuple(dims)


elsewhere.furnish(__name__)
