"""Updates kept small next to the parameters that they are for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.numerics.safe import like, scaled
from functrain.optim.transformation import (
    EmptyState,
    GradientTransformation,
    Updates,
    check_params,
    init_empty_state,
)
from functrain.schedules import Scalar
from functrain.tree import Params
from functrain.tree.reductions import length

AdaptiveGradClipState = EmptyState


def adaptive_grad_clip(
    clipping: Scalar, eps: Scalar = 1e-3, axis: int | tuple[int, ...] | None = None
) -> GradientTransformation:
    """Scale each unit of an update down until its norm is `clipping` times that of the parameter's unit, at least eps.

    Units are those of `unitwise_norm`. Source: Brock et al. 2021 (arXiv:2102.06171), equation 3.

    Raises: ValueError without params.

    >>> params, tx = torch.tensor([3.0, 4.0]), ft.optim.adaptive_grad_clip(0.1)
    >>> tx.update(torch.tensor([6.0, 8.0]), tx.init(params), params)[0]  # scaled to norm 0.1 * 5
    tensor([0.3000, 0.4000])
    """

    def clip_leaf(g: Tensor, p: Tensor) -> Tensor:
        largest = torch.clamp(unitwise_norm(p, axis), min=eps)
        return unitwise_clip(unitwise_norm(g, axis), like(clipping, largest) * largest, g)

    def update(updates: Updates, state: EmptyState, params: Params | None = None) -> tuple[Updates, EmptyState]:
        check_params(params, "adaptive_grad_clip")
        return tree.map(clip_leaf, updates, params, by_kind=True), state

    return GradientTransformation(init_empty_state, update)


def unitwise_norm(x: Tensor, axis: int | tuple[int, ...] | None = None) -> Tensor:
    """Return the norm of each unit of a tensor, in the tensor's shape.

    A unit is what one output reads: without `axis` (the dimensions of a unit) a whole vector, a slice along the first
    dimension of 2 or 3, along all but the last of 4 or 5.

    Raises: ValueError for more than 5 dimensions and no axis.

    >>> ft.optim.unitwise_norm(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    tensor([[3.0000, 4.1231],
            [3.0000, 4.1231]])
    """
    if axis is None and x.dim() > 5:
        raise ValueError(f"unitwise_norm: a unit of a tensor of {x.dim()} dimensions is not known; pass axis=")
    if axis is not None:
        dims: Any = axis
    elif sum(size != 1 for size in x.shape) <= 1:
        dims = tuple(range(x.dim()))
    else:
        dims = 0 if x.dim() <= 3 else tuple(range(x.dim() - 1))
    return length(x, lambda square: square.sum(dims, keepdim=True)).expand(x.shape)


def unitwise_clip(g_norm: Tensor, max_norm: Tensor, grad: Tensor, div_eps: Scalar = 1e-6) -> Tensor:
    """Scale units of `grad`, whose norms are `g_norm`, down to `max_norm`; all three in one shape.

    >>> grad = torch.tensor([[6.0, 8.0], [0.0, 0.5]])
    >>> ft.optim.unitwise_clip(ft.optim.unitwise_norm(grad), torch.ones(2, 2), grad)
    tensor([[1.0000, 0.9981],
            [0.0000, 0.0624]])
    """
    clipped = scaled(grad, max_norm / torch.clamp(g_norm, min=div_eps))
    return torch.where(g_norm < max_norm, grad, clipped)
