"""Second derivatives of a loss `loss(params, inputs, targets)`, as vectors over all its parameters.

n parameters, in the order of the tree's paths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.transforms import grad, vmap
from functrain.tree import Params, Tree, elsewhere

__all__ = ["LossFn", "fisher_diag", "hessian_diag", "hvp"]

LossFn: TypeAlias = Callable[[Params, Tree, Tree], Tensor]


def hvp(loss: LossFn, v: Tensor, params: Params, inputs: Tree, targets: Tree) -> Params:
    """Return the product of the loss's Hessian and `v`, a tree like params.

    Equals `optax.second_order.hvp`.

    Shapes: v (n,).
    Raises: ValueError when v has another number of elements.

    >>> loss = lambda params, inputs, targets: torch.sum((inputs @ params - targets) ** 2)
    >>> params, inputs, targets = torch.zeros(2), torch.diag(torch.tensor([1.0, 2.0])), torch.ones(2)
    >>> ft.optim.second_order.hvp(loss, torch.tensor([1.0, 1.0]), params, inputs, targets)
    tensor([2., 8.])
    """
    direction = _like(v, params)
    return grad(lambda p: tree.vdot(grad(loss)(p, inputs, targets), direction))(params)


def hessian_diag(loss: LossFn, params: Params, inputs: Tree, targets: Tree) -> Tensor:
    """Return the diagonal of the loss's Hessian, (n,): exact, at n times the work of `hvp`.

    Equals `optax.second_order.hessian_diag`.

    >>> loss = lambda params, inputs, targets: torch.sum((inputs @ params - targets) ** 2)
    >>> params, inputs, targets = torch.zeros(2), torch.diag(torch.tensor([1.0, 2.0])), torch.ones(2)
    >>> ft.optim.second_order.hessian_diag(loss, params, inputs, targets)
    tensor([2., 8.])
    """
    n = sum(leaf.numel() for leaf in tree.leaves(params))
    first = tree.leaves(params)[0]

    def element(v: Tensor) -> Tensor:
        return torch.vdot(v, _vector(hvp(loss, v, params, inputs, targets)))

    return vmap(element)(torch.eye(n, dtype=_vector(params).dtype, device=first.device))


def fisher_diag(negative_log_likelihood: LossFn, params: Params, inputs: Tree, targets: Tree) -> Tensor:
    """Return the squares of the gradient, (n,): the diagonal of the Fisher information that one batch shows.

    Equals `optax.second_order.fisher_diag`.

    >>> loss = lambda params, inputs, targets: torch.sum((inputs @ params - targets) ** 2)
    >>> params, inputs, targets = torch.zeros(2), torch.diag(torch.tensor([1.0, 2.0])), torch.ones(2)
    >>> ft.optim.second_order.fisher_diag(loss, params, inputs, targets)
    tensor([ 4., 16.])
    """
    return _vector(grad(negative_log_likelihood)(params, inputs, targets)) ** 2


def _vector(params: Params) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in tree.leaves(params)])


def _like(v: Tensor, params: Params) -> Params:
    leaves, structure = tree.flatten(params)
    sizes = [leaf.numel() for leaf in leaves]
    if v.shape != (sum(sizes),):
        raise ValueError(f"hvp: expected v ({sum(sizes)},), a number for each parameter, came {tuple(v.shape)}")
    pieces = zip(v.split(sizes), leaves, strict=True)
    return tree.unflatten(structure, [piece.reshape(leaf.shape).to(leaf.dtype) for piece, leaf in pieces])


elsewhere.furnish(__name__)
