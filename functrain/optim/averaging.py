"""Sums and averages of past updates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import functrain.optim.numerics.moments as moments
from functrain.optim.numerics.leafwise import leafwise
from functrain.optim.numerics.moments import zero_moments
from functrain.optim.numerics.safe import add_scaled, lerp, like, zero_count
from functrain.optim.transformation import (
    GradientTransformation,
    Updates,
)
from functrain.schedules import Scalar
from functrain.tree import Params, Tree


class TraceState(NamedTuple):
    trace: Tree  # like params, in accumulator_dtype if given: decayed sum of updates


def trace(
    decay: Scalar, nesterov: bool = False, accumulator_dtype: torch.dtype | None = None
) -> GradientTransformation:
    """Add up updates, the older ones decayed: trace = updates + decay * trace. Momentum as in `torch.optim.SGD`.

    >>> tx = ft.optim.trace(0.9)
    >>> first, state = tx.update(torch.tensor([1.0]), tx.init(torch.zeros(1)))
    >>> first, tx.update(torch.tensor([3.0]), state)[0]
    (tensor([1.]), tensor([3.9000]))
    """

    def init(params: Params) -> TraceState:
        return TraceState(zero_moments(params, accumulator_dtype))

    def update(updates: Updates, state: TraceState, params: Params | None = None) -> tuple[Updates, TraceState]:
        def step(g: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            t = add_scaled(g, decay, t)
            return add_scaled(g, decay, t) if nesterov else t, t

        updates, (total,) = leafwise(step, updates, (state.trace,))
        return updates, TraceState(total)

    return GradientTransformation(init, update)


class EmaState(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far
    ema: Tree  # like params, in accumulator_dtype if given: average of updates


def ema(decay: Scalar, debias: bool = True, accumulator_dtype: torch.dtype | None = None) -> GradientTransformation:
    """Average updates exponentially: ema = (1 - decay) * updates + decay * ema.

    >>> tx = ft.optim.ema(0.9)
    >>> first, state = tx.update(torch.tensor([0.5]), tx.init(torch.zeros(1)))
    >>> first, tx.update(torch.tensor([3.0]), state)[0]
    (tensor([0.5000]), tensor([1.8158]))
    """

    def init(params: Params) -> EmaState:
        return EmaState(zero_count(params), zero_moments(params, accumulator_dtype))

    def update(updates: Updates, state: EmaState, params: Params | None = None) -> tuple[Updates, EmaState]:
        count = state.count + 1
        factor = moments.debias(decay, count, updates) if debias else 1.0

        def step(g: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            t = lerp(t, g, 1 - decay)
            return like(factor, t) * t if debias else t, t

        updates, (average,) = leafwise(step, updates, (state.ema,))
        return updates, EmaState(count, average)

    return GradientTransformation(init, update)
