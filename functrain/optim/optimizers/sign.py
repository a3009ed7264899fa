"""Only the sign of a gradient."""

from __future__ import annotations

import torch

import functrain.tree as tree
from functrain.optim.averaging import ema
from functrain.optim.combining import chain
from functrain.optim.scaling import scale_by_learning_rate
from functrain.optim.transformation import (
    EmptyState,
    GradientTransformation,
    GradientTransformationExtraArgs,
    Updates,
    init_empty_state,
)
from functrain.schedules import Scalar, ScalarOrSchedule
from functrain.tree import Params


def scale_by_sign() -> GradientTransformation:
    """Replace updates by their signs; a complex one by its direction.

    >>> tx = ft.optim.scale_by_sign()
    >>> tx.update(torch.tensor([3.0, -0.01, 0.0]), tx.init(torch.zeros(3)))[0]
    tensor([ 1., -1.,  0.])
    """

    def update(updates: Updates, state: EmptyState, params: Params | None = None) -> tuple[Updates, EmptyState]:
        return tree.map(torch.sgn, updates, by_kind=True), state

    return GradientTransformation(init_empty_state, update)


def sign_sgd(learning_rate: ScalarOrSchedule) -> GradientTransformationExtraArgs:
    """Step along the sign of the gradient. Source: Bernstein et al. 2018 (arXiv:1802.04434), algorithm 1.

    >>> optimizer, params = ft.optim.sign_sgd(0.1), torch.zeros(2)
    >>> optimizer.update(torch.tensor([3.0, -0.01]), optimizer.init(params), params)[0]
    tensor([-0.1000,  0.1000])
    """
    return chain(scale_by_sign(), scale_by_learning_rate(learning_rate))


def signum(
    learning_rate: ScalarOrSchedule, beta: Scalar = 0.9, accumulator_dtype: torch.dtype | None = None
) -> GradientTransformationExtraArgs:
    """Step along the sign of the average gradient. Source: Bernstein et al. 2018 (arXiv:1802.04434), algorithm 2.

    >>> optimizer = ft.optim.signum(0.1)
    >>> _, state = optimizer.update(torch.tensor([3.0]), optimizer.init(torch.zeros(1)))
    >>> optimizer.update(torch.tensor([-1.0]), state)[0]  # the average is still positive
    tensor([-0.1000])
    """
    return chain(
        ema(beta, debias=False, accumulator_dtype=accumulator_dtype),
        scale_by_sign(),
        scale_by_learning_rate(learning_rate),
    )
