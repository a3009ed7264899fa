"""Polyak: a step as long as the loss is above its minimum."""

from __future__ import annotations

import torch

import functrain.tree as tree
from functrain.optim.clipping.norms import global_norm
from functrain.optim.combining import chain
from functrain.optim.numerics.safe import (
    plus,
    scaled,
)
from functrain.optim.optimizers.sgd import sgd
from functrain.optim.transformation import (
    EmptyState,
    GradientTransformationExtraArgs,
    Updates,
    init_empty_state,
)
from functrain.schedules import Scalar, ScalarOrSchedule
from functrain.tree import Params


def scale_by_polyak(
    f_min: Scalar = 0.0, max_learning_rate: Scalar = 1.0, eps: Scalar = 0.0, variant: str = "sps"
) -> GradientTransformationExtraArgs:
    """Multiply updates by min((value - f_min) / (squared norm of updates + eps), max_learning_rate).

    `update` takes the loss as `value=`. "sps+" takes a loss below `f_min` for one at it. Where the squared norm is not
    above the float64 epsilon, the update is 0.

    Source: Loizou et al. 2021 (arXiv:2002.10542).

    >>> tx, grads = ft.optim.scale_by_polyak(), torch.tensor([3.0, 4.0])
    >>> tx.update(grads, tx.init(torch.zeros(2)), value=torch.tensor(5.0))[0]  # the gradient times 5 / 25
    tensor([0.6000, 0.8000])
    """
    if variant not in ("sps", "sps+"):
        raise ValueError(f"scale_by_polyak: variant must be 'sps' or 'sps+', came {variant!r}")

    def update(
        updates: Updates, state: EmptyState, params: Params | None = None, *, value: Scalar, **extra_args: object
    ) -> tuple[Updates, EmptyState]:
        norm = global_norm(updates)
        square = norm**2
        gap = torch.as_tensor(value - f_min, dtype=square.dtype, device=square.device)
        gap = torch.clamp(gap, min=0.0) if variant == "sps+" else gap
        below = plus(square, eps)
        tiny = below <= torch.finfo(torch.float64).eps
        ratio = gap / torch.where(tiny, 1.0, below)
        # a square that is infinite is no step of 0
        ratio = torch.where(torch.isinf(square), gap / norm / norm, ratio)
        factor = torch.where(tiny, 0.0, torch.clamp(ratio, max=max_learning_rate))
        return tree.map(lambda g: scaled(g, factor), updates, by_kind=True), state

    return GradientTransformationExtraArgs(init_empty_state, update)


def polyak_sgd(
    max_learning_rate: Scalar = 1.0,
    scaling: ScalarOrSchedule = 1.0,
    f_min: Scalar = 0.0,
    eps: Scalar = 0.0,
    variant: str = "sps",
) -> GradientTransformationExtraArgs:
    """Descend along the gradient by the Polyak step; `update` takes the loss as `value=`.

    >>> params, optimizer = torch.tensor([1.0, -2.0]), ft.optim.polyak_sgd()
    >>> state, value = optimizer.init(params), torch.sum(params**2)
    >>> optimizer.update(2 * params, state, params, value=value)[0]
    tensor([-0.5000,  1.0000])
    """
    return chain(
        sgd(scaling),
        scale_by_polyak(f_min, max_learning_rate, eps, variant),
    )
