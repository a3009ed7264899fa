"""Adagrad: updates over the root of the sum of all their squares."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from functrain.optim.combining import chain
from functrain.optim.numerics.leafwise import by_parts, leafwise_squares
from functrain.optim.numerics.moments import full_parts
from functrain.optim.numerics.safe import (
    above_zero,
    abs_sq,
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


class ScaleByRssState(NamedTuple):
    sum_of_squares: Tree  # like params


def scale_by_rss(initial_accumulator_value: Scalar = 0.1, eps: Scalar = 1e-7) -> GradientTransformation:
    """Divide updates by the root of the sum of all squares so far, that starts at `initial_accumulator_value`.

    A complex leaf is taken for two real ones, as `torch.optim` does.

    >>> grads, tx = torch.tensor([1.0, -2.0]), ft.optim.scale_by_rss(initial_accumulator_value=0.0)
    >>> first, state = tx.update(grads, tx.init(torch.zeros(2)))
    >>> first, tx.update(grads, state)[0]
    (tensor([ 1., -1.]), tensor([ 0.7071, -0.7071]))
    """

    def init(params: Params) -> ScaleByRssState:
        return ScaleByRssState(full_parts(params, initial_accumulator_value))

    def update(
        updates: Updates, state: ScaleByRssState, params: Params | None = None
    ) -> tuple[Updates, ScaleByRssState]:
        def step(g: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
            total = abs_sq(g) + total
            inverse = torch.where(total != 0, torch.rsqrt(above_zero(plus(total, eps))), 0.0)
            return inverse * g, total

        updates, (total,) = leafwise_squares(by_parts(step), updates, (state.sum_of_squares,))
        return updates, ScaleByRssState(total)

    return GradientTransformation(init, update)


def adagrad(
    learning_rate: ScalarOrSchedule, initial_accumulator_value: Scalar = 0.1, eps: Scalar = 1e-7
) -> GradientTransformationExtraArgs:
    """Adagrad: `scale_by_rss`, then minus the learning rate.

    Source: Duchi et al. 2011, figure 1, diagonal.

    >>> optimizer, params = ft.optim.adagrad(0.1, initial_accumulator_value=0.0), torch.zeros(2)
    >>> optimizer.update(torch.tensor([1.0, -2.0]), optimizer.init(params), params)[0]
    tensor([-0.1000,  0.1000])
    """
    return chain(scale_by_rss(initial_accumulator_value, eps), scale_by_learning_rate(learning_rate))
