"""Gradients of single examples clipped before they are added."""

from __future__ import annotations

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.numerics.safe import like, working_dtype
from functrain.schedules import Scalar
from functrain.tree import Tree
from functrain.tree.reductions import of_squares, scaled_squares


def per_example_global_norm_clip(grads: Tree, l2_norm_clip: Scalar) -> tuple[Tree, Tensor]:
    """Scale the gradient of each example down to norm `l2_norm_clip`, and add; say how many were clipped.

    Shapes: every leaf is (B, ...). Source: Abadi et al. 2016 (arXiv:1607.00133), algorithm 1.

    Raises: ValueError naming the leaf whose first dimension is not B.

    >>> grads = {"w": torch.tensor([[6.0, 8.0], [0.3, 0.4]])}  # gradients of two examples
    >>> ft.optim.per_example_global_norm_clip(grads, l2_norm_clip=1.0)
    ({'w': tensor([0.9000, 1.2000])}, tensor(1))
    """
    sums, clipped = clipped_sums(grads, l2_norm_clip)
    return tree.map(lambda total, g: total.to(g.dtype), sums, grads), clipped


def clipped_sums(grads: Tree, l2_norm_clip: Scalar) -> tuple[Tree, Tensor]:
    """Do what `per_example_global_norm_clip` does, in float32 at least, and return the sums so."""
    _check_batch(grads)
    norm = norms(grads)
    # a gradient of zero has its own branch, so that a derivative through it is no product of zero and infinity
    zero = norm == 0
    ratio = like(l2_norm_clip, norm) / torch.where(zero, 1.0, norm)
    factor = torch.where(zero, 1.0, torch.nan_to_num(torch.clamp(ratio, max=1.0), nan=1.0))
    sums = tree.map(lambda g: torch.tensordot(factor.to(_wide(g).dtype), _wide(g), 1), grads)
    return sums, torch.sum(factor < 1.0)


def norms(grads: Tree) -> Tensor:
    """Return the norm of each example's gradient, (B,), of leaves (B, ...), in float32 at least."""
    dtype = working_dtype(grads)

    def rows(square: Tensor) -> Tensor:
        return square.reshape(len(square), -1).sum(1)

    pairs = [scaled_squares(g, rows, dtype) for g in tree.leaves(grads)]
    low, high = (torch.stack(terms).sum(0) for terms in zip(*pairs, strict=True))
    return of_squares(low, high)


def _wide(g: Tensor) -> Tensor:
    # rounded to bfloat16, a norm is off by 0.4 %, and so is the bound that privacy rests on
    return g.to(torch.promote_types(g.dtype, torch.float32))


def per_example_layer_norm_clip(grads: Tree, global_l2_norm_clip: Scalar, uniform: bool = True) -> tuple[Tree, Tree]:
    """Scale the gradient of each example and leaf down, and add; say how many were clipped, by leaf.

    Of K leaves each gets global_l2_norm_clip / sqrt(K), or if not uniform the root of its share of all elements.

    Source: McMahan et al. 2018 (arXiv:1710.06963).

    >>> grads = {"w": torch.tensor([[6.0, 8.0], [0.3, 0.4]])}  # gradients of two examples
    >>> ft.optim.per_example_layer_norm_clip(grads, global_l2_norm_clip=1.0)
    ({'w': tensor([0.9000, 1.2000])}, {'w': tensor(1)})
    """
    _check_batch(grads)
    leaves, structure = tree.flatten(grads)
    total = sum(g[0].numel() for g in leaves)
    shares = [1 / len(leaves) if uniform else g[0].numel() / total for g in leaves]
    pairs = [
        per_example_global_norm_clip(g, global_l2_norm_clip * share**0.5)
        for g, share in zip(leaves, shares, strict=True)
    ]
    return tree.unflatten(structure, [s for s, _ in pairs]), tree.unflatten(structure, [n for _, n in pairs])


def _check_batch(grads: Tree) -> None:
    sizes = {path: tuple(g.shape[:1]) for path, g in tree.items(grads)}
    first = next(iter(sizes.values()), ())
    for path, size in sizes.items():
        if size != first or not size:
            raise ValueError(
                f"{path}: expected one gradient for each of {first} examples, came {size}; use per_example_grad"
            )
