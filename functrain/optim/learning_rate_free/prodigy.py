"""Prodigy and D-Adaptation: Adam that finds its learning rate."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.numerics.leafwise import leafwise_squares
from functrain.optim.numerics.moments import debias, zero_moments
from functrain.optim.numerics.safe import (
    above_zero,
    add_scaled,
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


class ProdigyState(NamedTuple):
    exp_avg: Tree  # like params
    exp_avg_sq: Tree  # like params
    grad_sum: Tree  # like params
    params0: Params  # a copy of the first params
    estim_lr: Tensor  # ()
    numerator_weighted: Tensor  # ()
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far


class DAdaptAdamWState(NamedTuple):
    exp_avg: Tree  # like params
    exp_avg_sq: Tree  # like params
    grad_sum: Tree  # like params
    estim_lr: Tensor  # ()
    numerator_weighted: Tensor  # ()
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far


def prodigy(
    learning_rate: ScalarOrSchedule = 1.0,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    beta3: Scalar | None = None,
    eps: Scalar = 1e-8,
    estim_lr0: Scalar = 1e-6,
    estim_lr_coef: Scalar = 1.0,
    weight_decay: Scalar = 0.0,
    safeguard_warmup: bool = False,
) -> GradientTransformationExtraArgs:
    """AdamW whose learning rate is an estimate of the distance to the solution, times `learning_rate`.

    Source: Mishchenko and Defazio 2023 (arXiv:2306.06101), algorithm 4.

    Raises: ValueError without params; TypeError naming the leaf that is complex.

    >>> params, optimizer = torch.tensor([1.0, -2.0]), ft.optim.prodigy(estim_lr0=0.1)
    >>> optimizer.update(2 * params, optimizer.init(params), params)[0]
    tensor([-0.1000,  0.1000])
    """
    b1, b2 = betas
    b3 = b2**0.5 if beta3 is None else beta3

    def init(params: Params) -> ProdigyState:
        check_real(params, "prodigy")
        zero = torch.zeros((), dtype=working_dtype(params), device=device_of(params))
        m, v, total = [zero_moments(params) for _ in range(3)]
        return ProdigyState(
            m, v, total, tree.map(torch.clone, params), zero + like(estim_lr0, zero), zero.clone(), zero_count(params)
        )

    def update(
        updates: Updates, state: ProdigyState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, ProdigyState]:
        check_params(params, "prodigy")
        count, estimate = state.count + 1, state.estim_lr
        decay, first = like(b3, estimate), like(estim_lr0, estimate)
        rate = _rate(learning_rate, state.count, estimate) * _corrections(b1, b2, count, updates)
        way = tree.vdot(updates, tree.sub(state.params0, params))
        numerator = decay * state.numerator_weighted + estimate / first * rate * way
        weight = (estimate if safeguard_warmup else rate) / first * estimate
        total = tree.map(lambda g, t: _added(t, b3, wide(g), weight), updates, state.grad_sum, by_kind=True)
        found = _over_size(like(estim_lr_coef, estimate) * numerator, total)
        new_estimate = torch.maximum(estimate, found)
        least = new_estimate * like(eps, estimate)

        def step(g: Tensor, m: Tensor, v: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            g = like(estimate, g) * g
            m, v = lerp(m, g, 1 - b1), lerp(v, g * g, 1 - b2)
            return -like(rate, p) * (like(weight_decay, p) * p + m / (torch.sqrt(above_zero(v)) + like(least, v))), m, v

        new, (m, v) = leafwise_squares(step, updates, (state.exp_avg, state.exp_avg_sq), params)
        return new, ProdigyState(m, v, total, state.params0, new_estimate, numerator, count)

    return GradientTransformationExtraArgs(init, update)


def dadapt_adamw(
    learning_rate: ScalarOrSchedule = 1.0,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    estim_lr0: Scalar = 1e-6,
    weight_decay: Scalar = 0.0,
) -> GradientTransformationExtraArgs:
    """AdamW whose learning rate is a lower bound of the distance to the solution, times `learning_rate`.

    Source: Defazio and Mishchenko 2023 (arXiv:2301.07733), algorithm 5.

    Raises: ValueError without params; TypeError naming the leaf that is complex.

    >>> params, optimizer = torch.tensor([1.0, -2.0]), ft.optim.dadapt_adamw(estim_lr0=0.1)
    >>> optimizer.update(2 * params, optimizer.init(params), params)[0]
    tensor([-0.1000,  0.1000])
    """
    b1, b2 = betas
    sb2 = b2**0.5

    def init(params: Params) -> DAdaptAdamWState:
        check_real(params, "dadapt_adamw")
        zero = torch.zeros((), dtype=working_dtype(params), device=device_of(params))
        m, v, total = [zero_moments(params) for _ in range(3)]
        return DAdaptAdamWState(m, v, total, zero + like(estim_lr0, zero), zero.clone(), zero_count(params))

    def update(
        updates: Updates, state: DAdaptAdamWState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, DAdaptAdamWState]:
        check_params(params, "dadapt_adamw")
        count, decay = state.count + 1, like(sb2, state.estim_lr)
        rate = _rate(learning_rate, state.count, state.estim_lr) * _corrections(b1, b2, count, updates)
        roots = tree.map(lambda v: torch.sqrt(above_zero(wide(v))), state.exp_avg_sq, by_kind=True)
        weighted = tree.map(lambda t, root: wide(t) / plus(root, eps), state.grad_sum, roots, by_kind=True)
        numerator = decay * state.numerator_weighted + (1 - decay) * rate * tree.vdot(updates, weighted)
        share = (1 - decay) * rate

        def step(g: Tensor, m: Tensor, v: Tensor, total: Tensor, p: Tensor) -> tuple[Tensor, ...]:
            m = lerp(m, like(rate, g) * g, 1 - b1)
            v = lerp(v, g * g, 1 - b2)
            total = add_scaled(like(sb2, total) * total, share, g)
            return -like(weight_decay * rate, p) * p - m / plus(torch.sqrt(above_zero(v)), eps), m, v, total

        states = (state.exp_avg, state.exp_avg_sq, state.grad_sum)
        new, (m, v, total) = leafwise_squares(step, updates, states, params)
        estimate = torch.maximum(state.estim_lr, _over_size(numerator / (1 - decay), total))
        return new, DAdaptAdamWState(m, v, total, estimate, numerator, count)

    return GradientTransformationExtraArgs(init, update)


def _rate(learning_rate: ScalarOrSchedule, count: Tensor, estimate: Tensor) -> Tensor:
    rate = learning_rate(count) if callable(learning_rate) else check_number("prodigy: learning_rate", learning_rate)
    return estimate * (rate.to(estimate.dtype) if isinstance(rate, Tensor) else rate)


def _corrections(b1: Scalar, b2: Scalar, count: Tensor, updates: Updates) -> Tensor:
    return debias(b1, count, updates) / torch.sqrt(debias(b2, count, updates))


def _added(total: Tensor, decay: Scalar, g: Tensor, weight: Tensor) -> Tensor:
    full = wide(total)
    return add_scaled(like(decay, full) * full, weight, g).to(total.dtype)


def _over_size(numerator: Tensor, values: Tree) -> Tensor:
    """Return a number over the sum of absolute values; 0 where that is 0, as after steps of rate or gradient 0."""
    total = torch.zeros((), dtype=working_dtype(values), device=device_of(values))
    for leaf in tree.leaves(values):
        total = total + leaf.abs().sum(dtype=total.dtype)
    nothing = total == 0
    return torch.where(nothing, 0.0, numerator / torch.where(nothing, 1.0, total))
