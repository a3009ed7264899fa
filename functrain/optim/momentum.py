"""Sums and averages of past updates, and the optimizers that are nothing else."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.combining import chain
from functrain.optim.moments import bias_correction, cast, update_moment, zero_moments
from functrain.optim.numerics import like, zero_count
from functrain.optim.scaling import scale_by_learning_rate
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    Updates,
    identity,
)
from functrain.schedules import Scalar, ScalarOrSchedule
from functrain.tree import Params, Tree


class TraceState(NamedTuple):
    trace: Tree  # like params, in accumulator_dtype if given: decayed sum of updates


def trace(
    decay: Scalar, nesterov: bool = False, accumulator_dtype: torch.dtype | None = None
) -> GradientTransformation:
    """Add up updates, the older ones decayed: trace = updates + decay * trace. Momentum as in `torch.optim.SGD`."""

    def init(params: Params) -> TraceState:
        return TraceState(zero_moments(params, accumulator_dtype))

    def update(updates: Updates, state: TraceState, params: Params | None = None) -> tuple[Updates, TraceState]:
        def add(g: Tensor, t: Tensor) -> Tensor:
            return g + like(decay, t) * t

        total = tree.map(add, updates, state.trace)
        new = tree.map(add, updates, total) if nesterov else total
        return new, TraceState(cast(total, accumulator_dtype))

    return GradientTransformation(init, update)


class EmaState(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far
    ema: Tree  # like params, in accumulator_dtype if given: average of updates


def ema(decay: Scalar, debias: bool = True, accumulator_dtype: torch.dtype | None = None) -> GradientTransformation:
    """Average updates exponentially: ema = (1 - decay) * updates + decay * ema."""

    def init(params: Params) -> EmaState:
        return EmaState(zero_count(params), zero_moments(params, accumulator_dtype))

    def update(updates: Updates, state: EmaState, params: Params | None = None) -> tuple[Updates, EmaState]:
        count = state.count + 1
        average = update_moment(updates, state.ema, decay, 1)
        new = bias_correction(average, decay, count) if debias else average
        return new, EmaState(count, cast(average, accumulator_dtype))

    return GradientTransformation(init, update)


def sgd(
    learning_rate: ScalarOrSchedule,
    momentum: Scalar | None = None,
    nesterov: bool = False,
    accumulator_dtype: torch.dtype | None = None,
) -> GradientTransformationExtraArgs:
    """Descend along the gradient, or along its `trace` if there is a momentum.

    Source: Sutskever et al. 2013, equations 1 to 4.
    """
    past = identity() if momentum is None else trace(momentum, nesterov, accumulator_dtype)
    return chain(past, scale_by_learning_rate(learning_rate))
