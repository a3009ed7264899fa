"""A tree of tensors as one vector, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from functrain import tree
from functrain.tree import Tree


def check_vector(what: str, params: Tree, v: Tree) -> None:
    """Raise ValueError naming the paths where v is no vector over the parameters, a tree with the shapes of theirs."""
    tree.check_same_structure(params, v, what=what)
    for (path, leaf), of_v in zip(tree.items(params), tree.leaves(v), strict=True):
        if not isinstance(of_v, Tensor) or leaf.shape != of_v.shape:
            came = tuple(of_v.shape) if isinstance(of_v, Tensor) else type(of_v).__name__
            raise ValueError(
                f"{what}: {path or 'the tensor'}: expected shape {tuple(leaf.shape)}, as in params, came {came}; "
                "map over many vectors with ft.vmap"
            )


def check_floating(what: str, t: Tree) -> None:
    """Raise TypeError naming the first leaf that is no floating-point tensor: a result like it would be cut."""
    for path, leaf in tree.items(t):
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
            came = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(
                f"{what}: {path or 'the tensor'}: expected a floating-point tensor, came {came}; take other leaves out "
                "with tree.partition"
            )


def wide(t: Tree) -> Tree:
    """Return the tree with its leaves in float32 at least.

    Sums of many bfloat16 vectors keep two digits, and a basis of them is not orthogonal.
    """
    return tree.map(lambda leaf: leaf.to(torch.promote_types(leaf.dtype, torch.float32)), t)


def flat(t: Tree, *, batched: int = 0) -> Tensor:
    """Return all elements, float32 at least, (n,), after the first `batched` dimensions, which all leaves share."""
    rows = [leaf.flatten(batched) if leaf.dim() > batched else leaf.unsqueeze(-1) for leaf in tree.leaves(wide(t))]
    return torch.cat(rows, -1)


def like(vector: Tensor, t: Tree) -> Tree:
    """Return the tree with the elements of a vector, (n,), in the shapes and dtypes of `t`."""
    leaves, structure = tree.flatten(t)
    parts = torch.split(vector, [leaf.numel() for leaf in leaves])
    shaped = [part.view(leaf.shape).to(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
    return tree.unflatten(structure, shaped)
