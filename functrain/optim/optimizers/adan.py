"""Adan: Adam that also follows how gradients change."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from functrain.optim.combining import chain
from functrain.optim.decay import add_decayed_weights
from functrain.optim.masking import MaskOrFn
from functrain.optim.numerics.leafwise import leafwise_squares
from functrain.optim.numerics.moments import debias, zero_moments
from functrain.optim.numerics.safe import (
    above_zero,
    abs_sq,
    add_scaled,
    lerp,
    like,
    plus,
    zero_count,
)
from functrain.optim.scaling import scale_by_learning_rate
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    Updates,
)
from functrain.schedules import Scalar, ScalarOrSchedule
from functrain.tree import Params, Tree


class ScaleByAdanState(NamedTuple):
    m: Tree  # like params: average of gradients
    v: Tree  # like params: average of their differences
    n: Tree  # like params: average of the squares of the gradient looked ahead
    g: Tree  # like params: the last gradient
    t: Tensor  # (), int64: updates so far


def scale_by_adan(
    b1: Scalar = 0.98, b2: Scalar = 0.92, b3: Scalar = 0.99, eps: Scalar = 1e-8, eps_root: Scalar = 0.0
) -> GradientTransformation:
    """Rescale updates to (m + (1 - b2) * v) / (sqrt(n + eps_root) + eps).

    A complex update's square is |g|², as in optax.

    Source: Xie et al. 2023 (arXiv:2208.06677), algorithm 1; its betas are one minus these.

    >>> tx = ft.optim.scale_by_adan()
    >>> tx.update(torch.tensor([3.0, -0.5]), tx.init(torch.zeros(2)))[0]
    tensor([ 1.0000, -1.0000])
    """

    def init(params: Params) -> ScaleByAdanState:
        m, v, n, g = [zero_moments(params) for _ in range(4)]
        return ScaleByAdanState(m, v, n, g, zero_count(params))

    def update(
        updates: Updates, state: ScaleByAdanState, params: Params | None = None
    ) -> tuple[Updates, ScaleByAdanState]:
        count = state.t + 1
        m_factor, v_factor, n_factor = [debias(b, count, updates) for b in (b1, b2, b3)]

        def step(g: Tensor, m: Tensor, v: Tensor, n: Tensor, last: Tensor) -> tuple[Tensor, ...]:
            change = torch.where(state.t == 0, 0.0, g - last)
            m = lerp(m, g, 1 - b1)
            v = lerp(v, change, 1 - b2)
            n = lerp(n, abs_sq(add_scaled(g, 1 - b2, change)), 1 - b3)
            ahead = add_scaled(like(m_factor, m) * m, 1 - b2, like(v_factor, v) * v)
            # a copy of g: the caller may use the memory of a gradient again
            return ahead / plus(torch.sqrt(above_zero(plus(like(n_factor, n) * n, eps_root))), eps), m, v, n, g.clone()

        updates, (m, v, n, g) = leafwise_squares(step, updates, (state.m, state.v, state.n, state.g))
        return updates, ScaleByAdanState(m, v, n, g, count)

    return GradientTransformation(init, update)


def adan(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.98,
    b2: Scalar = 0.92,
    b3: Scalar = 0.99,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn = None,
) -> GradientTransformationExtraArgs:
    """Adan: `scale_by_adan`, then decoupled weight decay, then minus the learning rate.

    >>> params, optimizer = torch.tensor([1.0, -2.0]), ft.optim.adan(0.1)
    >>> optimizer.update(torch.tensor([3.0, -0.5]), optimizer.init(params), params)[0]
    tensor([-0.1000,  0.1000])
    """
    return chain(
        scale_by_adan(b1, b2, b3, eps, eps_root),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
