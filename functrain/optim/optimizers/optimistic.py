"""Optimism: the next gradient will differ from this one as this one does from the last."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from functrain.optim.combining import chain
from functrain.optim.numerics.leafwise import leafwise
from functrain.optim.numerics.moments import zero_moments
from functrain.optim.numerics.safe import (
    device_of,
    like,
)
from functrain.optim.optimizers.adam import scale_by_adam
from functrain.optim.scaling import scale_by_learning_rate
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    Updates,
)
from functrain.schedules import Scalar, ScalarOrSchedule
from functrain.tree import Params, Tree


class ScaleByOptimisticGradientState(NamedTuple):
    is_initial_step: Tensor  # (), bool
    previous_gradient: Tree  # like params


def scale_by_optimistic_gradient(alpha: Scalar = 1.0, beta: Scalar = 1.0) -> GradientTransformation:
    """Replace updates by (alpha + beta) * updates - beta * the updates before.

    Source: Mokhtari et al. 2020 (arXiv:1901.08511).

    >>> tx = ft.optim.scale_by_optimistic_gradient()
    >>> first, state = tx.update(torch.tensor([3.0]), tx.init(torch.zeros(1)))
    >>> first, tx.update(torch.tensor([5.0]), state)[0]
    (tensor([3.]), tensor([7.]))
    """

    def init(params: Params) -> ScaleByOptimisticGradientState:
        start = torch.ones((), dtype=torch.bool, device=device_of(params))
        return ScaleByOptimisticGradientState(start, zero_moments(params))

    def update(
        updates: Updates, state: ScaleByOptimisticGradientState, params: Params | None = None
    ) -> tuple[Updates, ScaleByOptimisticGradientState]:
        def step(g: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
            last = torch.where(state.is_initial_step, g, last)
            # a copy of g: the caller may use the memory of a gradient again
            return like(alpha + beta, g) * g - like(beta, last) * last, g.clone()

        updates, (last,) = leafwise(step, updates, (state.previous_gradient,))
        return updates, ScaleByOptimisticGradientState(torch.zeros_like(state.is_initial_step), last)

    return GradientTransformation(init, update)


def optimistic_gradient_descent(
    learning_rate: ScalarOrSchedule, alpha: Scalar = 1.0, beta: Scalar = 1.0
) -> GradientTransformationExtraArgs:
    """Descend along the optimistic gradient.

    >>> optimizer = ft.optim.optimistic_gradient_descent(0.1)
    >>> _, state = optimizer.update(torch.tensor([3.0]), optimizer.init(torch.zeros(1)))
    >>> optimizer.update(torch.tensor([5.0]), state)[0]
    tensor([-0.7000])
    """
    return chain(scale_by_optimistic_gradient(alpha, beta), scale_by_learning_rate(learning_rate))


def optimistic_adam_v2(
    learning_rate: ScalarOrSchedule,
    *,
    alpha: Scalar = 1.0,
    beta: Scalar = 1.0,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
    nesterov: bool = True,
) -> GradientTransformationExtraArgs:
    """Adam, then optimism. Source: Daskalakis et al. 2018 (arXiv:1711.00141), algorithm 1.

    >>> optimizer, params = ft.optim.optimistic_adam_v2(0.1, nesterov=False), torch.zeros(2)
    >>> optimizer.update(torch.tensor([3.0, -0.5]), optimizer.init(params), params)[0]
    tensor([-0.1000,  0.1000])
    """
    return chain(
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov),
        scale_by_optimistic_gradient(alpha, beta),
        scale_by_learning_rate(learning_rate),
    )


def optimistic_adam(
    learning_rate: Scalar,
    optimism: Scalar | None = None,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = True,
) -> GradientTransformationExtraArgs:
    """Adam, then optimism of a size of its own, by default the learning rate; deprecated in optax for the `_v2`.

    Raises: ValueError for a learning rate that is a schedule.

    >>> import warnings
    >>> with warnings.catch_warnings(action="ignore"):
    ...     optimizer = ft.optim.optimistic_adam(0.1, nesterov=False)
    >>> optimizer.update(torch.tensor([3.0, -0.5]), optimizer.init(torch.zeros(2)))[0]
    tensor([-0.1000,  0.1000])
    """
    warnings.warn("optimistic_adam is deprecated, use optimistic_adam_v2", DeprecationWarning, stacklevel=2)
    if callable(learning_rate):
        raise ValueError("optimistic_adam takes no schedule for a learning rate; optimistic_adam_v2 does")
    return chain(
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov),
        scale_by_optimistic_gradient(learning_rate, learning_rate if optimism is None else optimism),
        scale_by_learning_rate(1.0),
    )
