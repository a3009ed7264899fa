"""Adadelta: updates in units of the parameters themselves."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from functrain.optim.combining import chain
from functrain.optim.decay import add_decayed_weights
from functrain.optim.masking import MaskOrFn
from functrain.optim.numerics.leafwise import by_parts, leafwise_squares
from functrain.optim.numerics.moments import zero_moments
from functrain.optim.numerics.safe import (
    lerp,
    plus,
)
from functrain.optim.scaling import scale_by_learning_rate
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    Updates,
)
from functrain.schedules import Scalar, ScalarOrSchedule
from functrain.tree import Params, Tree


class ScaleByAdaDeltaState(NamedTuple):
    e_g: Tree  # like params: average of squared gradients
    e_x: Tree  # like params: average of squared updates


def scale_by_adadelta(rho: Scalar = 0.9, eps: Scalar = 1e-6) -> GradientTransformation:
    """Rescale updates by the root mean square of past updates over that of past gradients.

    A complex leaf is taken for two real ones, as `torch.optim` does.

    Source: Zeiler 2012 (arXiv:1212.5701), algorithm 1.

    >>> tx = ft.optim.scale_by_adadelta(rho=0.9, eps=0.1)
    >>> tx.update(torch.tensor([3.0, -0.5]), tx.init(torch.zeros(2)))[0]
    tensor([ 0.9487, -0.4472])
    """

    def init(params: Params) -> ScaleByAdaDeltaState:
        return ScaleByAdaDeltaState(zero_moments(params), zero_moments(params))

    def update(
        updates: Updates, state: ScaleByAdaDeltaState, params: Params | None = None
    ) -> tuple[Updates, ScaleByAdaDeltaState]:
        def step(g: Tensor, e_g: Tensor, e_x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            e_g = lerp(e_g, g * g, 1 - rho)
            u = torch.sqrt(plus(e_x, eps)) / torch.sqrt(plus(e_g, eps)) * g
            return u, e_g, lerp(e_x, u * u, 1 - rho)

        updates, (e_g, e_x) = leafwise_squares(by_parts(step), updates, (state.e_g, state.e_x))
        return updates, ScaleByAdaDeltaState(e_g, e_x)

    return GradientTransformation(init, update)


def adadelta(
    learning_rate: ScalarOrSchedule | None = None,
    rho: Scalar = 0.9,
    eps: Scalar = 1e-6,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: MaskOrFn = None,
) -> GradientTransformationExtraArgs:
    """Adadelta: weight decay into the gradient, `scale_by_adadelta`, then minus the learning rate.

    Without a learning rate, as in optax, updates keep the sign of the gradient: chain with `scale(-1)`.

    >>> params, optimizer = torch.tensor([1.0, -2.0]), ft.optim.adadelta(1.0, eps=0.1)
    >>> optimizer.update(torch.tensor([3.0, -0.5]), optimizer.init(params), params)[0]
    tensor([-0.9487,  0.4472])
    """
    return chain(
        add_decayed_weights(weight_decay, weight_decay_mask),
        scale_by_adadelta(rho, eps),
        scale_by_learning_rate(learning_rate),
    )
