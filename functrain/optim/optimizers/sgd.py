"""Descent along the gradient, or along the sum of past ones."""

from __future__ import annotations

import torch

from functrain.optim.averaging import trace
from functrain.optim.combining import chain
from functrain.optim.scaling import scale_by_learning_rate
from functrain.optim.transformation import GradientTransformationExtraArgs, identity
from functrain.schedules import Scalar, ScalarOrSchedule


def sgd(
    learning_rate: ScalarOrSchedule,
    momentum: Scalar | None = None,
    nesterov: bool = False,
    accumulator_dtype: torch.dtype | None = None,
) -> GradientTransformationExtraArgs:
    """Descend along the gradient, or along its `trace` if there is a momentum.

    Source: Sutskever et al. 2013, equations 1 to 4.

    >>> grads, optimizer = torch.tensor([1.0, -2.0]), ft.optim.sgd(0.1, momentum=0.9)
    >>> first, state = optimizer.update(grads, optimizer.init(torch.zeros(2)))
    >>> first, optimizer.update(grads, state)[0]
    (tensor([-0.1000,  0.2000]), tensor([-0.1900,  0.3800]))
    """
    past = identity() if momentum is None else trace(momentum, nesterov, accumulator_dtype)
    return chain(past, scale_by_learning_rate(learning_rate))
