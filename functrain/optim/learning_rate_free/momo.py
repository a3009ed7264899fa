"""MoMo: momentum whose step is as long as a model of the loss allows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.numerics.leafwise import leafwise, leafwise_squares
from functrain.optim.numerics.moments import debias, zero_moments
from functrain.optim.numerics.safe import (
    above_zero,
    device_of,
    lerp,
    like,
    plus,
    working_dtype,
    zero_count,
)
from functrain.optim.transformation import (
    GradientTransformationExtraArgs,
    Updates,
    check_params,
    check_real,
)
from functrain.schedules import Scalar, ScalarOrSchedule
from functrain.schedules.schedule import check_number
from functrain.tree import Params, Tree
from functrain.tree.reductions import wide


class MomoState(NamedTuple):
    exp_avg: Tree  # like params
    barf: Tensor  # (): average of losses
    gamma: Tensor  # (): average of inner products of gradients and params
    lb: Tensor  # (): lower bound of the loss
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far


class MomoAdamState(NamedTuple):
    exp_avg: Tree  # like params
    exp_avg_sq: Tree  # like params
    barf: Tensor  # (): average of losses
    gamma: Tensor  # (): average of inner products of gradients and params
    lb: Tensor  # (): lower bound of the loss
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far


def momo(
    learning_rate: ScalarOrSchedule = 1.0,
    beta: Scalar = 0.9,
    lower_bound: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    adapt_lower_bound: bool = False,
) -> GradientTransformationExtraArgs:
    """SGD with momentum, the step at most the learning rate; `update` takes the loss as `value=`.

    Source: Schaipp et al. 2023 (arXiv:2305.07583), algorithm 1.

    Raises: ValueError without params; TypeError naming the leaf that is complex.

    >>> params, optimizer = torch.tensor([1.0, -2.0]), ft.optim.momo()
    >>> state, value = optimizer.init(params), torch.sum(params**2)
    >>> optimizer.update(2 * params, state, params, value=value)[0]  # a rate of 5 / 20, the value over the squared norm
    tensor([-0.5000,  1.0000])
    """

    def init(params: Params) -> MomoState:
        check_real(params, "momo")
        zero = torch.zeros((), dtype=working_dtype(params), device=device_of(params))
        return MomoState(zero_moments(params), zero, zero.clone(), zero + like(lower_bound, zero), zero_count(params))

    def update(
        updates: Updates, state: MomoState, params: Params | None = None, *, value: Scalar, **extra_args: Any
    ) -> tuple[Updates, MomoState]:
        check_params(params, "momo")
        weight = 1 - beta * (state.count > 0).to(working_dtype(updates))  # 1 at the first update
        _, (mean,) = leafwise(lambda g, m: (g, lerp(m, g, weight)), updates, (state.exp_avg,))
        barf = lerp(state.barf, _loss(value, state.barf), weight)
        gamma = lerp(state.gamma, tree.vdot(updates, params), weight)
        size, product = tree.norm(mean), tree.vdot(mean, params)
        square = size**2
        rate = _number(learning_rate, state.count, barf)
        shrink = 1 + rate * weight_decay
        bound = state.lb
        if adapt_lower_bound:
            cap = shrink * (barf - gamma) + product
            bound = torch.where(
                cap < shrink * bound, torch.clamp(cap / (2 * shrink), min=like(lower_bound, cap)), bound
            )
        gap = torch.clamp(shrink * (barf - bound - gamma) + product, min=0.0)
        # a square that is infinite is no step of 0
        length = torch.where(torch.isinf(square), gap / size / size, _over(gap, square))
        length = torch.minimum(rate, length)
        decay = rate * weight_decay / shrink
        new = tree.map(lambda m, p: _down(p, decay, m, length), mean, params, by_kind=True)
        lb = state.lb
        if adapt_lower_bound:
            half = torch.where(torch.isinf(square), 0.5 * length * size * size, 0.5 * length * square)
            lb = torch.clamp(barf + product - gamma - half, min=like(lower_bound, cap))
        return new, MomoState(mean, barf, gamma, lb, state.count + 1)

    return GradientTransformationExtraArgs(init, update)


def momo_adam(
    learning_rate: ScalarOrSchedule = 1e-2,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    lower_bound: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    adapt_lower_bound: bool = False,
) -> GradientTransformationExtraArgs:
    """Adam, the step at most the learning rate; `update` takes the loss as `value=`.

    Source: Schaipp et al. 2023 (arXiv:2305.07583), algorithm 2.

    Raises: ValueError without params; TypeError naming the leaf that is complex.

    >>> params, optimizer = torch.tensor([1.0, -2.0]), ft.optim.momo_adam(0.1)
    >>> state, value = optimizer.init(params), torch.sum(params**2)
    >>> optimizer.update(2 * params, state, params, value=value)[0]
    tensor([-0.1000,  0.1000])
    """

    def init(params: Params) -> MomoAdamState:
        check_real(params, "momo_adam")
        zero = torch.zeros((), dtype=working_dtype(params), device=device_of(params))
        m, v = zero_moments(params), zero_moments(params)
        return MomoAdamState(m, v, zero, zero.clone(), zero + like(lower_bound, zero), zero_count(params))

    def update(
        updates: Updates, state: MomoAdamState, params: Params | None = None, *, value: Scalar, **extra_args: Any
    ) -> tuple[Updates, MomoAdamState]:
        check_params(params, "momo_adam")
        count = state.count + 1
        m_factor, v_factor = debias(b1, count, updates), debias(b2, count, updates)

        def step(g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            m, v = lerp(m, g, 1 - b1), lerp(v, g * g, 1 - b2)
            return m / plus(torch.sqrt(above_zero(like(v_factor, v) * v)), eps), m, v

        rescaled, (m, v) = leafwise_squares(step, updates, (state.exp_avg, state.exp_avg_sq))
        barf = lerp(state.barf, _loss(value, state.barf), 1 - b1)
        gamma = lerp(state.gamma, tree.vdot(updates, params), 1 - b1)
        square, product = tree.vdot(m, rescaled), tree.vdot(m, params)
        rate = _number(learning_rate, state.count, barf)
        shrink = 1 + rate * weight_decay
        bound = state.lb
        if adapt_lower_bound:
            cap = shrink * (barf - gamma) + product
            lowered = torch.clamp(cap * m_factor / (2 * shrink), min=like(lower_bound, cap))
            bound = torch.where(cap < shrink * bound / m_factor, lowered, bound)
        length = _over(torch.clamp(shrink * (barf - bound / m_factor - gamma) + product, min=0.0), square)
        length = torch.minimum(rate * m_factor, length)
        decay = rate * weight_decay / shrink
        new = tree.map(lambda r, p: _down(p, decay, r, length), rescaled, params, by_kind=True)
        lb = state.lb
        if adapt_lower_bound:
            lb = torch.clamp((barf + product - gamma - 0.5 * length * square) * m_factor, min=like(lower_bound, cap))
        return new, MomoAdamState(m, v, barf, gamma, lb, count)

    return GradientTransformationExtraArgs(init, update)


def _loss(value: Scalar, example: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=example.dtype, device=example.device)


def _number(learning_rate: ScalarOrSchedule, count: Tensor, example: Tensor) -> Tensor:
    return _loss(
        learning_rate(count) if callable(learning_rate) else check_number("momo: learning_rate", learning_rate), example
    )


def _down(p: Tensor, decay: Tensor, direction: Tensor, length: Tensor) -> Tensor:
    full, way = wide(p), wide(direction)
    return (-like(decay, full) * full - like(length, way) * way).to(p.dtype)


def _over(numerator: Tensor, square: Tensor) -> Tensor:
    """Return the quotient, and 0 where the squared norm is not above the float64 epsilon."""
    tiny = square <= torch.finfo(torch.float64).eps
    return torch.where(tiny, 0.0, numerator / torch.where(tiny, 1.0, square))
