"""All elements of a tree as one number."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from functrain.tree.flattening import leaves
from functrain.tree.mapping import each
from functrain.tree.nodes import Tree


def sum(tree: Tree) -> Tensor:
    """Return the sum of all elements, a () tensor: at least float32, of integers int64; 0.0 for an empty tree."""
    return joined(each(_sum, [leaves(tree)], tree), torch.sum, 0.0)


def max(tree: Tree) -> Tensor:
    """Return the largest element, a () tensor; -inf for a tree without elements."""
    return joined(_of_filled(torch.amax, tree), torch.amax, -torch.inf)


def min(tree: Tree) -> Tensor:
    """Return the smallest element, a () tensor; inf for a tree without elements."""
    return joined(_of_filled(torch.amin, tree), torch.amin, torch.inf)


def norm(tree: Tree, ord: int | float | str | None = None, squared: bool = False) -> Tensor:
    """Return a norm of all elements together, a () tensor, at least float32: Euclidean, or of the order given.

    Orders are None or 2, 1 for the sum of absolute values, and `math.inf` or "inf" for the largest.
    At zero the Euclidean norm's derivative is zero, as that of `torch.linalg.norm`. `squared` returns the square.

    Raises: ValueError for another order.
    """
    if ord is None or ord == 2:
        square = joined(each(_squares, [leaves(tree)], tree), torch.sum, 0.0)
        return square if squared else root(square)
    if ord == 1:
        size = joined(each(lambda x: torch.sum(torch.abs(wide(x))), [leaves(tree)], tree), torch.sum, 0.0)
    elif ord in (math.inf, "inf", "infinity"):
        size = joined(_of_filled(lambda x: torch.amax(torch.abs(wide(x))), tree), torch.amax, 0.0)
    else:
        raise ValueError(f"norm: expected the order None, 1, 2 or inf, came {ord!r}")
    return size * size if squared else size


def joined(terms: list[Tensor], join: Callable[[Tensor], Tensor], nothing: float) -> Tensor:
    """Return `join` of () tensors, in the dtype that all of them go into; `nothing` where there are none."""
    return join(torch.stack(terms)) if terms else torch.full((), nothing)  # stack promotes to the widest dtype


def root(square: Tensor) -> Tensor:
    """Return the square root, whose derivative is zero at zero."""
    # the derivative is infinite there, and infinity times the zero that comes back from an unused norm is NaN
    zero = square == 0
    return torch.where(zero, 0.0, torch.sqrt(torch.where(zero, 1.0, square)))


def wide(leaf: Tensor) -> Tensor:
    """Return a leaf as a floating-point or complex tensor of at least 32 bits a number.

    A bfloat16 sum of a million squares stops growing at about 256 times a term, and int8 wraps at 12 * 12.
    """
    if not isinstance(leaf, Tensor):
        raise TypeError(f"expected a tensor, came {leaf!r}; take it out with tree.partition")
    if leaf.dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128):
        return leaf
    return leaf.to(torch.complex64) if leaf.is_complex() else leaf.float()


def _sum(leaf: Tensor) -> Tensor:
    integer = isinstance(leaf, Tensor) and not leaf.is_floating_point() and not leaf.is_complex()
    return torch.sum(leaf if integer else wide(leaf))


def _squares(leaf: Tensor) -> Tensor:
    leaf = wide(leaf)
    return torch.sum(leaf.real**2 + leaf.imag**2) if leaf.is_complex() else torch.sum(leaf * leaf)


def _of_filled(fn: Callable[[Tensor], Tensor], tree: Tree) -> list[Tensor]:
    found = each(lambda leaf: fn(leaf) if leaf.numel() else None, [leaves(tree)], tree)
    return [term for term in found if term is not None]
