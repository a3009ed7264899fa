"""Trees with the same shapes in another dtype, on another device, or filled with one number."""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

from functrain.tree.flattening import items
from functrain.tree.hints import listed
from functrain.tree.mapping import map
from functrain.tree.nodes import Tree


def cast(tree: Tree, dtype: torch.dtype | None) -> Tree:
    """Return the tree with its floating-point tensors in `dtype`; other leaves stay as they are, all of them for None.

    Raises: ValueError when `dtype` is not a floating-point one.

    >>> batch = {"x": torch.ones(2), "label": torch.tensor([0, 1])}
    >>> ft.tree.cast(batch, torch.bfloat16)  # labels stay integers
    {'x': tensor([1., 1.], dtype=torch.bfloat16), 'label': tensor([0, 1])}
    """
    if dtype is None:
        return tree
    if not dtype.is_floating_point:
        raise ValueError(f"cast: expected a floating-point dtype, came {dtype}; use tree.map with x.to(dtype)")
    return map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, tree)


def to(tree: Tree, device: torch.device | str) -> Tree:
    """Return the tree with its tensors on `device`.

    >>> params = ft.tree.to({"w": torch.ones(2, 3)}, "meta")  # or "cuda", "cpu"
    >>> params["w"].device
    device(type='meta')
    """
    return map(lambda x: x.to(device) if isinstance(x, Tensor) else x, tree)


def zeros_like(tree: Tree, dtype: torch.dtype | None = None) -> Tree:
    """Return a tree of zeros with the same shapes, in `dtype` if given.

    >>> ft.tree.zeros_like({"w": torch.ones(2, dtype=torch.bfloat16)}, torch.float32)
    {'w': tensor([0., 0.])}
    """
    return map(lambda x: torch.zeros_like(x, dtype=dtype), tree)


def ones_like(tree: Tree, dtype: torch.dtype | None = None) -> Tree:
    """Return a tree of ones with the same shapes, in `dtype` if given.

    >>> ft.tree.ones_like({"w": torch.zeros(2), "step": torch.tensor(7)})
    {'w': tensor([1., 1.]), 'step': tensor(1)}
    """
    return map(lambda x: torch.ones_like(x, dtype=dtype), tree)


def full_like(tree: Tree, fill_value: float | Tensor, dtype: torch.dtype | None = None) -> Tree:
    """Return a tree filled with `fill_value`, a number or a () tensor, in `dtype` if given.

    >>> ft.tree.full_like({"w": torch.zeros(2), "b": torch.tensor(0.0)}, 0.5)
    {'w': tensor([0.5000, 0.5000]), 'b': tensor(0.5000)}
    """
    if isinstance(fill_value, Tensor):
        zeros = zeros_like(tree, dtype)
        return map(lambda x: x + fill_value.to(x.dtype), zeros)
    return map(lambda x: torch.full_like(x, fill_value, dtype=dtype), tree)


def cast_like(tree: Tree, other_tree: Tree) -> Tree:
    """Return the tree with every tensor in the dtype of the leaf of `other_tree` at its path.

    >>> params = {"w": torch.ones(2, dtype=torch.bfloat16)}
    >>> ft.tree.cast_like({"w": torch.tensor([0.5, 2.0])}, params)
    {'w': tensor([0.5000, 2.0000], dtype=torch.bfloat16)}
    """
    return map(lambda x, y: x.to(y.dtype) if isinstance(y, Tensor) else x, tree, other_tree)


def dtype(tree: Tree, mixed_dtype_handler: Literal["promote", "highest", "lowest"] | None = None) -> torch.dtype:
    """Return the dtype of a tree's tensors, torch's default one for an empty tree.

    Of several, "promote" returns what all of them promote to, and "highest" and "lowest" the one that all others
    promote to, or that promotes to all others.

    Raises: ValueError naming the leaves of other dtypes without a handler; for two dtypes neither of which promotes to
    the other; for another handler.

    >>> params = {"norm": torch.ones(2), "w": torch.ones(2, dtype=torch.bfloat16)}
    >>> ft.tree.dtype(params, "highest"), ft.tree.dtype(params, "lowest")
    (torch.float32, torch.bfloat16)
    """
    if mixed_dtype_handler not in (None, "promote", "highest", "lowest"):
        raise ValueError(f"dtype: expected None, 'promote', 'highest' or 'lowest', came {mixed_dtype_handler!r}")
    found = [(path, leaf.dtype) for path, leaf in items(tree)]
    if not found:
        return torch.get_default_dtype()
    if mixed_dtype_handler is None:
        first = found[0][1]
        others = [f"{path} ({came})" for path, came in found if came != first]
        if others:
            raise ValueError(
                f"dtype: {found[0][0]} has {first}; expected it everywhere, came {listed(others)}; "
                "pass mixed_dtype_handler='promote'"
            )
        return first
    pairwise = {"promote": torch.promote_types, "highest": _higher, "lowest": _lower}[mixed_dtype_handler]
    return functools.reduce(pairwise, [came for _, came in found])


def _higher(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    both = torch.promote_types(a, b)
    if both not in (a, b):
        raise ValueError(f"dtype: expected two dtypes of which one promotes to the other, came {a} and {b}; cast one")
    return both


def _lower(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    return b if _higher(a, b) == a else a
