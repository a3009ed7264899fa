"""ADOPT: Adam that divides by the second moment of the past alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from functrain.optim.combining import chain
from functrain.optim.numerics.leafwise import by_parts, leafwise_squares
from functrain.optim.numerics.moments import zero_moments
from functrain.optim.numerics.safe import above_zero, abs_sq, clamp, lerp, lerp_over, scalar, working_dtype, zero_count
from functrain.optim.optimizers.adam import ScaleByAdamState
from functrain.optim.scaling import scale_by_learning_rate
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    Updates,
)
from functrain.schedules import Scalar, ScalarOrSchedule
from functrain.tree import Params


def scale_by_adopt(
    b1: Scalar = 0.9,
    b2: Scalar = 0.9999,
    eps: Scalar = 1e-6,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = False,
    use_clipping: bool = True,
    clip_value_fn: Callable[[Tensor], Tensor] = lambda count: count**0.25,
) -> GradientTransformation:
    """Average updates over max(sqrt(nu), eps), nu without the update itself; the first update only starts nu.

    The quotients are clipped to `clip_value_fn(number of updates so far)`, which is given float64.

    A complex leaf is taken for two real ones, as `torch.optim` does.

    Source: Taniguchi et al. 2024 (arXiv:2411.02853), with clipping.

    >>> grads, tx = torch.tensor([3.0, -0.5]), ft.optim.scale_by_adopt()
    >>> first, state = tx.update(grads, tx.init(torch.zeros(2)))
    >>> first, tx.update(grads, state)[0]
    (tensor([0., 0.]), tensor([ 0.1000, -0.1000]))
    """

    def init(params: Params) -> ScaleByAdamState:
        return ScaleByAdamState(zero_count(params), zero_moments(params, mu_dtype), zero_moments(params))

    def update(
        updates: Updates, state: ScaleByAdamState, params: Params | None = None
    ) -> tuple[Updates, ScaleByAdamState]:
        later = (state.count > 0).to(working_dtype(updates))  # 0 at the first update
        mu_weight, nu_weight = later * (1 - b1), 1 - later * b2
        bound = scalar(clip_value_fn(state.count.to(torch.float64)), updates) if use_clipping else None

        def step(g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            quotient = g / torch.clamp(torch.sqrt(above_zero(v)), min=eps)
            quotient = quotient if bound is None else clamp(quotient, -bound, bound)
            m = lerp(m, quotient, mu_weight)
            return lerp(m, quotient, mu_weight) if nesterov else m, m, lerp_over(v, abs_sq(g), nu_weight)

        updates, (mu, nu) = leafwise_squares(by_parts(step), updates, (state.mu, state.nu))
        return updates, ScaleByAdamState(state.count + 1, mu, nu)

    return GradientTransformation(init, update)


def adopt(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.9999,
    eps: Scalar = 1e-6,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = False,
    use_clipping: bool = True,
    clip_value_fn: Callable[[Tensor], Tensor] = lambda count: count**0.25,
) -> GradientTransformationExtraArgs:
    """ADOPT: `scale_by_adopt`, then minus the learning rate.

    >>> grads, optimizer = torch.tensor([3.0, -0.5]), ft.optim.adopt(0.1)
    >>> _, state = optimizer.update(grads, optimizer.init(torch.zeros(2)))
    >>> optimizer.update(grads, state)[0]
    tensor([-0.0100,  0.0100])
    """
    return chain(
        scale_by_adopt(
            b1, b2, eps, mu_dtype, nesterov=nesterov, use_clipping=use_clipping, clip_value_fn=clip_value_fn
        ),
        scale_by_learning_rate(learning_rate),
    )
