"""Yogi: Adam whose second moment moves by a bounded amount."""

from __future__ import annotations

import torch
from torch import Tensor

from functrain.optim.combining import chain
from functrain.optim.numerics.leafwise import leafwise_squares
from functrain.optim.numerics.moments import debias, full_moments
from functrain.optim.numerics.safe import (
    above_zero,
    abs_sq,
    lerp,
    like,
    plus,
    zero_count,
)
from functrain.optim.optimizers.adam import ScaleByAdamState
from functrain.optim.scaling import scale_by_learning_rate
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    Updates,
)
from functrain.schedules import Scalar, ScalarOrSchedule
from functrain.tree import Params


def scale_by_yogi(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-3,
    eps_root: Scalar = 0.0,
    initial_accumulator_value: Scalar = 1e-6,
) -> GradientTransformation:
    """Rescale updates as Adam does, nu moving by (1 - b2) * updates² towards updates².

    Both moments start at `initial_accumulator_value`. A complex update's square is |g|², as in optax.

    Source: Zaheer et al. 2018, algorithm 2.

    >>> tx = ft.optim.scale_by_yogi()
    >>> tx.update(torch.tensor([3.0, -0.5]), tx.init(torch.zeros(2)))[0]
    tensor([ 0.9996, -0.9960])
    """

    def init(params: Params) -> ScaleByAdamState:
        start = initial_accumulator_value
        return ScaleByAdamState(zero_count(params), full_moments(params, start), full_moments(params, start))

    def update(
        updates: Updates, state: ScaleByAdamState, params: Params | None = None
    ) -> tuple[Updates, ScaleByAdamState]:
        count = state.count + 1
        mu_factor, nu_factor = debias(b1, count, updates), debias(b2, count, updates)

        def step(g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            square = abs_sq(g)
            m = lerp(m, g, 1 - b1)
            v = v - like(1 - b2, v) * torch.sgn(v - square) * square
            return (
                like(mu_factor, m) * m / plus(torch.sqrt(above_zero(plus(like(nu_factor, v) * v, eps_root))), eps),
                m,
                v,
            )

        updates, (mu, nu) = leafwise_squares(step, updates, (state.mu, state.nu))
        return updates, ScaleByAdamState(count, mu, nu)

    return GradientTransformation(init, update)


def yogi(
    learning_rate: ScalarOrSchedule, b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-3
) -> GradientTransformationExtraArgs:
    """Yogi: `scale_by_yogi`, then minus the learning rate.

    >>> optimizer, params = ft.optim.yogi(0.1), torch.zeros(2)
    >>> optimizer.update(torch.tensor([3.0, -0.5]), optimizer.init(params), params)[0]
    tensor([-0.1000,  0.0996])
    """
    return chain(scale_by_yogi(b1, b2, eps), scale_by_learning_rate(learning_rate))
