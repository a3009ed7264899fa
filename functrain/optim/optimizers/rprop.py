"""Rprop: steps that grow while the sign of the gradient stays."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from functrain.optim.combining import chain
from functrain.optim.numerics.leafwise import by_parts, leafwise
from functrain.optim.numerics.moments import full_parts, zero_moments
from functrain.optim.numerics.safe import clamp, like
from functrain.optim.scaling import scale
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    Updates,
)
from functrain.schedules import Scalar
from functrain.schedules.schedule import check_number
from functrain.tree import Params, Tree


class ScaleByRpropState(NamedTuple):
    step_sizes: Tree  # like params
    prev_updates: Tree  # like params: the last updates, 0 where the sign had changed


def scale_by_rprop(
    learning_rate: Scalar,
    eta_minus: Scalar = 0.5,
    eta_plus: Scalar = 1.2,
    min_step_size: Scalar = 1e-6,
    max_step_size: Scalar = 50.0,
) -> GradientTransformation:
    """Step along the sign of the update by a size that grows where the sign stays and shrinks where it changes.

    Where it changes, the update is 0 this time. Equals `torch.optim.Rprop`. optax 0.2.8 gives each update one step
    late; here it is that of the paper.

    A complex leaf is taken for two real ones, as `torch.optim` does.

    Source: Riedmiller and Braun 1993; Igel and Huesken 2000, iRprop-.

    >>> tx = ft.optim.scale_by_rprop(0.1)
    >>> first, state = tx.update(torch.tensor([3.0, -0.5]), tx.init(torch.zeros(2)))
    >>> first, tx.update(torch.tensor([2.0, 0.5]), state)[0]
    (tensor([ 0.1000, -0.1000]), tensor([0.1200, 0.0000]))
    """
    check_number("scale_by_rprop: learning_rate", learning_rate)

    def init(params: Params) -> ScaleByRpropState:
        return ScaleByRpropState(full_parts(params, learning_rate), zero_moments(params))

    def update(
        updates: Updates, state: ScaleByRpropState, params: Params | None = None
    ) -> tuple[Updates, ScaleByRpropState]:
        def step(g: Tensor, size: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            agree = g * last
            moved = torch.where(agree > 0, like(eta_plus, size) * size, like(eta_minus, size) * size)
            size = torch.where(agree == 0, size, clamp(moved, min_step_size, max_step_size))
            new = torch.where(agree < 0, 0.0, size * torch.sign(g))
            return new, size, new

        updates, (sizes, last) = leafwise(by_parts(step), updates, (state.step_sizes, state.prev_updates))
        return updates, ScaleByRpropState(sizes, last)

    return GradientTransformation(init, update)


def rprop(
    learning_rate: Scalar,
    eta_minus: Scalar = 0.5,
    eta_plus: Scalar = 1.2,
    min_step_size: Scalar = 1e-6,
    max_step_size: Scalar = 50.0,
) -> GradientTransformationExtraArgs:
    """Rprop: `scale_by_rprop`, downhill.

    >>> optimizer = ft.optim.rprop(0.1)
    >>> _, state = optimizer.update(torch.tensor([3.0, -0.5]), optimizer.init(torch.zeros(2)))
    >>> optimizer.update(torch.tensor([2.0, -0.1]), state)[0]
    tensor([-0.1200,  0.1200])
    """
    return chain(scale_by_rprop(learning_rate, eta_minus, eta_plus, min_step_size, max_step_size), scale(-1.0))
