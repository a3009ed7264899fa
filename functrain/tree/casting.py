"""Trees with the same shapes in another dtype, on another device, or filled with one number."""

from __future__ import annotations

import torch
from torch import Tensor

from functrain.tree.mapping import map
from functrain.tree.nodes import Tree


def cast(tree: Tree, dtype: torch.dtype) -> Tree:
    """Return the tree with its floating-point tensors in `dtype`; other leaves stay as they are.

    Raises: ValueError when `dtype` is not a floating-point one.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"cast: expected a floating-point dtype, came {dtype}; use tree.map with x.to(dtype)")
    return map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, tree)


def to(tree: Tree, device: torch.device | str) -> Tree:
    """Return the tree with its tensors on `device`."""
    return map(lambda x: x.to(device) if isinstance(x, Tensor) else x, tree)


def zeros_like(tree: Tree, dtype: torch.dtype | None = None) -> Tree:
    """Return a tree of zeros with the same shapes, in `dtype` if given."""
    return map(lambda x: torch.zeros_like(x, dtype=dtype), tree)


def ones_like(tree: Tree, dtype: torch.dtype | None = None) -> Tree:
    """Return a tree of ones with the same shapes, in `dtype` if given."""
    return map(lambda x: torch.ones_like(x, dtype=dtype), tree)


def full_like(tree: Tree, value: float, dtype: torch.dtype | None = None) -> Tree:
    """Return a tree filled with `value`, in `dtype` if given."""
    return map(lambda x: torch.full_like(x, value, dtype=dtype), tree)
