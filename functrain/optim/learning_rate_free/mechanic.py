"""Mechanic: a learning rate found for any optimizer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.clipping.norms import global_norm
from functrain.optim.numerics.safe import (
    add_scaled,
    device_of,
    largest_squared,
    like,
    plus,
    working_dtype,
    zero_count,
)
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    OptState,
    Updates,
    check_params,
    with_extra_args_support,
)
from functrain.schedules import Scalar
from functrain.tree import Params
from functrain.tree.reductions import wide


class MechanicState(NamedTuple):
    base_optimizer_state: OptState
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far
    r: Tensor  # (num_betas,): reward
    m: Tensor  # (num_betas,): the largest inner product
    v: Tensor  # (num_betas,): the sum of their squares
    s: Tensor  # (num_betas,): scales, whose sum multiplies the base optimizer's way from the start
    x0: Params  # a copy of the first params


def mechanize(
    base_optimizer: GradientTransformation,
    weight_decay: Scalar = 1e-2,
    eps: Scalar = 1e-8,
    s_init: Scalar = 1e-6,
    num_betas: int = 6,
) -> GradientTransformationExtraArgs:
    """Multiply the way that `base_optimizer` went from the start by a scale that is learned.

    Source: Cutkosky et al. 2023 (arXiv:2306.00144), algorithm 1.

    Raises: ValueError without params.

    >>> optimizer, params = ft.optim.mechanize(ft.optim.sgd(1.0), s_init=0.1), torch.tensor([1.0, -2.0])
    >>> updates, state = optimizer.update(2 * params, optimizer.init(params), params)
    >>> updates, state.s
    (tensor([-0.2000,  0.4000]), tensor([0.0167, 0.0167, 0.0167, 0.0167, 0.0167, 0.0167]))
    """
    base = with_extra_args_support(base_optimizer)

    def init(params: Params) -> MechanicState:
        zeros = torch.zeros(num_betas, dtype=working_dtype(params), device=device_of(params))
        start = tree.map(torch.clone, params)
        return MechanicState(
            base.init(params), zero_count(params), zeros, zeros.clone(), zeros.clone(), zeros + s_init, start
        )

    def update(
        updates: Updates, state: MechanicState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, MechanicState]:
        check_params(params, "mechanize")
        moves, base_state = base.update(updates, state.base_optimizer_state, params, **extra_args)
        start = tree.where(state.count == 0, params, state.x0)
        total = state.s.sum()
        decay = weight_decay * total * global_norm(updates) / plus(tree.norm(params), eps)
        decayed = tree.map(lambda g, p: add_scaled(wide(g), decay, wide(p)), updates, params, by_kind=True)
        width = plus(total, eps)
        # minus the base optimizer's way
        way = tree.map(lambda x0, p: (wide(x0) - wide(p)) / like(width, wide(p)), start, params, by_kind=True)
        product = tree.vdot(decayed, way).real.to(state.m.dtype)
        largest = largest_squared(product)
        product = torch.clamp(product, -largest, largest)
        powers = torch.arange(1, num_betas + 1, device=state.s.device)
        betas = 1.0 - 0.1 ** powers.to(state.s.dtype)
        m = torch.maximum(betas * state.m, plus(product.abs(), eps))
        v = betas**2 * state.v + product**2
        r = betas * state.r + torch.clamp(product, -state.m, state.m) * state.s
        wealth = s_init / num_betas * m + torch.clamp(r, min=0.0)
        s = wealth / plus(_safe_sqrt(v), eps)
        factor = s.sum()

        def step(x0: Tensor, w: Tensor, u: Tensor, p: Tensor) -> Tensor:
            return (wide(x0) - like(factor, w) * (w - wide(u)) - wide(p)).to(p.dtype)

        new = tree.map(step, start, way, moves, params, by_kind=True)
        return new, MechanicState(base_state, state.count + 1, r, m, v, s, start)

    return GradientTransformationExtraArgs(init, update)


def _safe_sqrt(v: Tensor) -> Tensor:
    # v is 0 until the way is one: there the root's slope is infinite, and times 0 it is NaN
    return torch.where(v > 0, torch.sqrt(torch.where(v > 0, v, 1.0)), 0.0)
