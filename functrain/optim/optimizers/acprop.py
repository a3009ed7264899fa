"""ACProp: AdaBelief without momentum, that divides by the past alone."""

from __future__ import annotations

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
    lerp,
    like,
    plus,
    zero_count,
)
from functrain.optim.optimizers.adabelief import ScaleByBeliefState
from functrain.optim.scaling import scale_by_learning_rate
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    Updates,
)
from functrain.schedules import Scalar, ScalarOrSchedule
from functrain.tree import Params


def scale_by_acprop(
    b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-16, eps_root: Scalar = 1e-16
) -> GradientTransformation:
    """Divide updates by sqrt(nu) + eps, nu being the average squared distance of past updates from their average.

    A complex update's square is |g|², as in optax.

    Source: Zhuang et al. 2021 (arXiv:2110.05454).

    >>> grads, tx = torch.tensor([3.0, -0.5]), ft.optim.scale_by_acprop()
    >>> first, state = tx.update(grads, tx.init(torch.zeros(2)))
    >>> first, tx.update(grads, state)[0]
    (tensor([ 3.0000, -0.5000]), tensor([ 1.0000, -1.0000]))
    """

    def init(params: Params) -> ScaleByBeliefState:
        return ScaleByBeliefState(zero_count(params), zero_moments(params), zero_moments(params))

    def update(
        updates: Updates, state: ScaleByBeliefState, params: Params | None = None
    ) -> tuple[Updates, ScaleByBeliefState]:
        first = state.count == 0
        factor = debias(b2, torch.where(first, 1, state.count), updates)

        def step(g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            nu_hat = torch.where(first, 1.0, like(factor, v) * v)
            new_v = plus(lerp(v, abs_sq(g - m), 1 - b2), eps_root)
            return g / plus(torch.sqrt(above_zero(nu_hat)), eps), lerp(m, g, 1 - b1), new_v

        updates, (mu, nu) = leafwise_squares(step, updates, (state.mu, state.nu))
        return updates, ScaleByBeliefState(state.count + 1, mu, nu)

    return GradientTransformation(init, update)


def acprop(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-16,
    eps_root: Scalar = 1e-16,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn = None,
) -> GradientTransformationExtraArgs:
    """ACProp: `scale_by_acprop`, then decoupled weight decay, then minus the learning rate.

    >>> optimizer = ft.optim.acprop(0.1)
    >>> params, grads = torch.zeros(2), torch.tensor([3.0, -0.5])
    >>> _, state = optimizer.update(grads, optimizer.init(params), params)
    >>> optimizer.update(grads, state, params)[0]
    tensor([-0.1000,  0.1000])
    """
    return chain(
        scale_by_acprop(b1, b2, eps, eps_root),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
