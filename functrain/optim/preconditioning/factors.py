"""A tensor as a matrix, once along each of its dimensions: what Kronecker-factored preconditioners are made of."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.tree import Tree

Item = TypeVar("Item")


def unfold(x: Tensor, dim: int) -> Tensor:
    """Return the matrix of the vectors of x along `dim`: (..., n, ...) to (n, elements / n)."""
    return x.movedim(dim, 0).reshape(x.shape[dim], math.prod(x.shape[:dim]) * math.prod(x.shape[dim + 1 :]))


def multiply(matrix: Tensor, x: Tensor, dim: int) -> Tensor:
    """Return x with each vector along `dim` multiplied by `matrix`, (n, n), or by the diagonal (n,)."""
    moved = x.movedim(dim, 0)
    flat = unfold(x, dim)
    product = matrix @ flat if matrix.dim() == 2 else matrix[:, None] * flat
    return product.reshape(moved.shape).movedim(0, dim)


def gram(x: Tensor, dim: int) -> Tensor:
    """Return the sum of the outer products of the vectors of x along `dim`, (n, n)."""
    matrix = unfold(x, dim)
    return matrix @ matrix.mH


def precise(x: Tensor) -> Tensor:
    """Return x in float32 at least: what torch has decompositions and triangular solves for."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def group(flat: Iterable[Item], params: Tree) -> list[list[Item]]:
    """Return lists of one item per dimension, for each leaf of params."""
    items = iter(flat)
    return [[next(items) for _ in range(leaf.dim())] for leaf in tree.leaves(params)]
