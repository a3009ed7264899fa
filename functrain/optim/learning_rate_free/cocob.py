"""COCOB: betting on coins in place of a learning rate."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.combining import chain
from functrain.optim.decay import add_decayed_weights
from functrain.optim.masking import MaskOrFn
from functrain.optim.numerics.leafwise import leafwise_squares
from functrain.optim.numerics.moments import full_moments, zero_moments
from functrain.optim.numerics.safe import (
    like,
)
from functrain.optim.scaling import scale_by_learning_rate
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    Updates,
    check_params,
    check_real,
)
from functrain.schedules import Scalar, ScalarOrSchedule
from functrain.tree import Params, Tree


class COCOBState(NamedTuple):
    init_particles: Params  # a copy of the first params
    cumulative_gradients: Tree  # like params: minus the sum of gradients
    scale: Tree  # like params: the largest gradient so far
    subgradients: Tree  # like params: the sum of their sizes
    reward: Tree  # like params: what was won


def scale_by_cocob(alpha: Scalar = 100.0, eps: Scalar = 1e-8) -> GradientTransformation:
    """Move each parameter to where its bets put it.

    Source: Orabona and Tommasi 2017 (arXiv:1705.07795), algorithm 2.

    Raises: ValueError without params; TypeError naming the leaf that is complex.

    >>> tx, params = ft.optim.scale_by_cocob(), torch.tensor([5.0])
    >>> updates, state = tx.update(2 * params, tx.init(params), params)
    >>> updates  # the first bet is 1 / alpha
    tensor([-0.0100])
    """

    def init(params: Params) -> COCOBState:
        check_real(params, "scale_by_cocob")
        total, sizes, reward = [zero_moments(params) for _ in range(3)]
        return COCOBState(tree.map(torch.clone, params), total, full_moments(params, eps), sizes, reward)

    def update(updates: Updates, state: COCOBState, params: Params | None = None) -> tuple[Updates, COCOBState]:
        check_params(params, "scale_by_cocob")

        def step(
            g: Tensor, total: Tensor, largest: Tensor, sizes: Tensor, reward: Tensor, p: Tensor, start: Tensor
        ) -> tuple[Tensor, ...]:
            largest = torch.maximum(largest, torch.abs(g))
            sizes = sizes + torch.abs(g)
            reward = torch.clamp(reward - g * (p - start), min=0.0)
            total = total - g
            bound = largest * torch.maximum(sizes + largest, like(alpha, largest) * largest)
            return start - p + total / bound * (largest + reward), total, largest, sizes, reward

        states = (state.cumulative_gradients, state.scale, state.subgradients, state.reward)
        new, (total, largest, sizes, reward) = leafwise_squares(step, updates, states, params, state.init_particles)
        return new, COCOBState(state.init_particles, total, largest, sizes, reward)

    return GradientTransformation(init, update)


def cocob(
    learning_rate: ScalarOrSchedule = 1.0,
    alpha: Scalar = 100.0,
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn = None,
) -> GradientTransformationExtraArgs:
    """COCOB: weight decay into the gradient, times the learning rate, then `scale_by_cocob`.

    >>> optimizer, params = ft.optim.cocob(), torch.tensor([5.0, -5.0])
    >>> optimizer.update(2 * params, optimizer.init(params), params)[0]
    tensor([-0.0100,  0.0100])
    """
    return chain(
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate, flip_sign=False),
        scale_by_cocob(alpha, eps),
    )
