"""One operation on every leaf: quotients, bounds, parts of complex numbers, more dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from functrain.tree.mapping import map
from functrain.tree.nodes import Tree


def div(a: Tree, b: Tree) -> Tree:
    """Return a / b, leaf by leaf.

    >>> ft.tree.div({"w": torch.tensor([3.0, 8.0])}, {"w": torch.tensor([2.0, 4.0])})
    {'w': tensor([1.5000, 2.0000])}
    """
    return map(torch.div, a, b, by_kind=True)


def clip(tree: Tree, min_value: float | Tensor | None = None, max_value: float | Tensor | None = None) -> Tree:
    """Return the tree with every element in [min_value, max_value]; None is no bound. A leaf keeps its dtype.

    Shapes: a tensor bound is () or broadcasts with every leaf.

    >>> ft.tree.clip({"w": torch.tensor([-3.0, 0.5, 2.0])}, -1.0, 1.0)
    {'w': tensor([-1.0000,  0.5000,  1.0000])}
    """
    return map(lambda leaf: _bounded(leaf, min_value, max_value), tree, by_kind=True)


def conj(tree: Tree) -> Tree:
    """Return the complex conjugates; real leaves stay as they are.

    >>> ft.tree.conj({"w": torch.tensor([1 + 2j]), "b": torch.tensor([3.0])})
    {'w': tensor([1.-2.j]), 'b': tensor([3.])}
    """
    return map(torch.conj, tree, by_kind=True)


def real(tree: Tree) -> Tree:
    """Return the real parts.

    >>> ft.tree.real({"w": torch.tensor([1 + 2j])})
    {'w': tensor([1.])}
    """
    return map(torch.real, tree, by_kind=True)


def batch_shape(tree: Tree, shape: tuple[int, ...] = ()) -> Tree:
    """Return the tree with leading dimensions `shape`, along which every leaf repeats, as views.

    Shapes: a leaf (...) becomes (*shape, ...).

    >>> lanes = ft.tree.batch_shape({"w": torch.tensor([1.0, 2.0])}, (3,))  # for ft.vmap
    >>> lanes["w"].shape
    torch.Size([3, 2])
    """
    return map(lambda leaf: leaf.expand(*shape, *leaf.shape), tree)


def _bounded(leaf: Tensor, low: float | Tensor | None, high: float | Tensor | None) -> Tensor:
    if low is not None:
        leaf = torch.maximum(leaf, low.to(leaf.dtype)) if isinstance(low, Tensor) else torch.clamp(leaf, min=low)
    if high is not None:
        leaf = torch.minimum(leaf, high.to(leaf.dtype)) if isinstance(high, Tensor) else torch.clamp(leaf, max=high)
    return leaf
