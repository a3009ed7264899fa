"""Nearest points of convex sets, in the Euclidean norm of all elements of a tree together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import functrain.tree as tree_room
from functrain.losses import sparsemax
from functrain.optim.numerics.safe import clamp
from functrain.schedules import Scalar
from functrain.tree import Tree, elsewhere

__all__ = [
    "projection_box", "projection_halfspace", "projection_hypercube", "projection_hyperplane", "projection_l1_ball",
    "projection_l1_sphere", "projection_l2_ball", "projection_l2_sphere", "projection_linf_ball",
    "projection_non_negative", "projection_simplex", "projection_vector",
]  # fmt: skip


def projection_non_negative(tree: Tree) -> Tree:
    """Return the nearest tree without negative elements.

    >>> ft.optim.projections.projection_non_negative(torch.tensor([1.5, -2.0]))
    tensor([1.5000, 0.0000])
    """
    return tree_room.map(torch.relu, tree)


def projection_box(tree: Tree, lower: Any, upper: Any) -> Tree:
    """Return the nearest tree between `lower` and `upper`, each a number or a tree like `tree`.

    >>> ft.optim.projections.projection_box(torch.tensor([1.5, -2.0, 0.5]), lower=-1.0, upper=1.0)
    tensor([ 1.0000, -1.0000,  0.5000])
    """
    bounds = [b if tree_room.structure(b) == tree_room.structure(tree) else _spread(b, tree) for b in (lower, upper)]
    return tree_room.map(clamp, tree, *bounds)


def projection_hypercube(tree: Tree, scale: Any = 1) -> Tree:
    """Return the nearest tree between 0 and `scale`, a number or a tree like `tree`.

    >>> ft.optim.projections.projection_hypercube(torch.tensor([1.5, -2.0, 0.5]))
    tensor([1.0000, 0.0000, 0.5000])
    """
    return projection_box(tree, 0, scale)


def projection_simplex(tree: Tree, scale: Scalar = 1) -> Tree:
    """Return the nearest tree without negative elements that sums to `scale`.

    Source: Duchi et al. 2008, Efficient projections onto the l1-ball.

    >>> ft.optim.projections.projection_simplex(torch.tensor([0.5, 1.0, -3.0]))
    tensor([0.2500, 0.7500, 0.0000])
    """
    leaves, structure = tree_room.flatten(tree)
    values = torch.cat([leaf.reshape(-1) for leaf in leaves])  # (N,), all elements
    pieces = (scale * sparsemax(values / scale)).split([leaf.numel() for leaf in leaves])
    shaped = [p.reshape(leaf.shape).to(leaf.dtype) for p, leaf in zip(pieces, leaves, strict=True)]
    return tree_room.unflatten(structure, shaped)


def projection_l1_sphere(tree: Tree, scale: Scalar = 1) -> Tree:
    """Return the nearest tree whose absolute values sum to `scale`; a zero stays zero.

    >>> ft.optim.projections.projection_l1_sphere(torch.tensor([0.25, -0.5]))
    tensor([ 0.3750, -0.6250])
    """
    sizes = projection_simplex(tree_room.map(torch.abs, tree), scale)
    return tree_room.map(lambda leaf, size: torch.sign(leaf) * size, tree, sizes)


def projection_l1_ball(tree: Tree, scale: Scalar = 1) -> Tree:
    """Return the nearest tree whose absolute values sum to at most `scale`.

    >>> ft.optim.projections.projection_l1_ball(torch.tensor([1.0, -1.5]))
    tensor([ 0.2500, -0.7500])
    >>> ft.optim.projections.projection_l1_ball(torch.tensor([0.5, -0.25]))
    tensor([ 0.5000, -0.2500])
    """
    inside = tree_room.norm(tree, 1) <= scale
    return tree_room.where(inside, tree, projection_l1_sphere(tree, scale))


def projection_l2_sphere(tree: Tree, scale: Scalar = 1) -> Tree:
    """Return the nearest tree of norm `scale`; NaN for a tree of zeros, from which all are as far.

    >>> ft.optim.projections.projection_l2_sphere(torch.tensor([0.3, 0.4]))
    tensor([0.6000, 0.8000])
    """
    return tree_room.scale(scale / tree_room.norm(tree), tree)


def projection_l2_ball(tree: Tree, scale: Scalar = 1) -> Tree:
    """Return the nearest tree of a norm of at most `scale`.

    >>> ft.optim.projections.projection_l2_ball({"w": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    {'w': tensor([0.6000]), 'b': tensor([0.8000])}
    """
    square = tree_room.norm(tree, squared=True)
    return tree_room.scale(scale / torch.sqrt(torch.clamp(square, min=scale**2)), tree)


def projection_linf_ball(tree: Tree, scale: Scalar = 1) -> Tree:
    """Return the nearest tree without an element beyond `scale`, of either sign.

    >>> ft.optim.projections.projection_linf_ball(torch.tensor([1.5, -2.0, 0.5]))
    tensor([ 1.0000, -1.0000,  0.5000])
    """
    return projection_box(tree, -scale, scale)


def projection_vector(x: Tree, a: Tree) -> Tree:
    """Return the multiple of `a` that is nearest to `x`.

    >>> ft.optim.projections.projection_vector(torch.tensor([3.0, 4.0]), torch.tensor([2.0, 0.0]))
    tensor([3., 0.])
    """
    return tree_room.scale(tree_room.vdot(x, a) / tree_room.vdot(a, a), a)


def projection_hyperplane(x: Tree, a: Tree, b: Scalar) -> Tree:
    """Return the tree nearest to `x` whose inner product with `a` is `b`.

    >>> ft.optim.projections.projection_hyperplane(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 1.0]), 1.0)
    tensor([0., 1.])
    """
    return tree_room.add_scale(x, _distance(x, a, b), a)


def projection_halfspace(x: Tree, a: Tree, b: Scalar) -> Tree:
    """Return the tree nearest to `x` whose inner product with `a` is at most `b`.

    >>> ft.optim.projections.projection_halfspace(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0]), 1.0)
    tensor([3., 1.])
    """
    return tree_room.add_scale(x, torch.clamp(_distance(x, a, b), max=0), a)


def _distance(x: Tree, a: Tree, b: Scalar) -> Tensor:
    """Return how many times `a` must be added to x for an inner product of b with it, ()."""
    return (b - tree_room.vdot(x, a)) / tree_room.vdot(a, a)


def _spread(bound: Scalar, tree: Tree) -> Tree:
    return tree_room.map(lambda _: bound, tree)


elsewhere.furnish(__name__)
