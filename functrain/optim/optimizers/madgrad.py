"""MADGRAD: dual averaging over the cube root of the sum of squares."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.combining import chain
from functrain.optim.decay import add_decayed_weights
from functrain.optim.numerics.leafwise import by_parts, leafwise_squares
from functrain.optim.numerics.moments import zero_moments
from functrain.optim.numerics.safe import (
    add_scaled,
    like,
    plus,
    scalar,
    zero_count,
)
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    Updates,
    check_params,
)
from functrain.schedules import Scalar, ScalarOrSchedule
from functrain.tree import Params, Tree


class MadgradState(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far
    grad_sum_sq: Tree  # like params: weighted sum of squares
    s: Tree  # like params: weighted sum of updates
    x0: Params  # a copy of the first params


def scale_by_madgrad(
    learning_rate: ScalarOrSchedule, momentum: Scalar = 0.9, eps: Scalar = 1e-6
) -> GradientTransformation:
    """Move params towards x0 - s / (cbrt(grad_sum_sq) + eps), by 1 - momentum of the way.

    A complex leaf is taken for two real ones, as `torch.optim` does.

    Source: Defazio and Jelassi 2021 (arXiv:2101.11075), algorithm 1.

    Raises: ValueError without params.

    >>> params, tx = torch.tensor([1.0, -2.0]), ft.optim.scale_by_madgrad(0.1)
    >>> tx.update(torch.tensor([3.0, -0.5]), tx.init(params), params)[0]
    tensor([-0.0311,  0.0171])
    """

    def init(params: Params) -> MadgradState:
        start = tree.map(torch.clone, params)
        return MadgradState(zero_count(params), zero_moments(params), zero_moments(params), start)

    def update(updates: Updates, state: MadgradState, params: Params | None = None) -> tuple[Updates, MadgradState]:
        check_params(params, "scale_by_madgrad")
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        weight = scalar((rate + eps) * torch.sqrt((state.count + 1).to(torch.float64)), updates)

        def step(g: Tensor, squares: Tensor, total: Tensor, p: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            squares = add_scaled(squares, weight, g * g)
            total = add_scaled(total, weight, g)
            none = squares == 0  # where the root has no derivative
            root = torch.where(none, 0.0, torch.where(none, 1.0, squares) ** (1 / 3))
            target = start - total / plus(root, eps)
            return like(1 - momentum, p) * (target - p), squares, total

        updates, (squares, total) = leafwise_squares(
            by_parts(step), updates, (state.grad_sum_sq, state.s), params, state.x0
        )
        return updates, MadgradState(state.count + 1, squares, total, state.x0)

    return GradientTransformation(init, update)


def madgrad(
    learning_rate: ScalarOrSchedule, momentum: Scalar = 0.9, weight_decay: ScalarOrSchedule = 0.0, eps: Scalar = 1e-6
) -> GradientTransformationExtraArgs:
    """MADGRAD: weight decay into the gradient, then `scale_by_madgrad`.

    >>> params, optimizer = torch.tensor([1.0, -2.0]), ft.optim.madgrad(0.1, momentum=0.0)
    >>> optimizer.update(torch.tensor([8.0, -1.0]), optimizer.init(params), params)[0]
    tensor([-0.4309,  0.2154])
    """
    return chain(add_decayed_weights(weight_decay), scale_by_madgrad(learning_rate, momentum, eps))
