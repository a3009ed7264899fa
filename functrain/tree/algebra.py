"""Trees of tensors as vectors: sums and products. Leaf by leaf, so that all of it also runs under vmap."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from functrain.tree.by_kind import once_a_kind
from functrain.tree.flattening import flatten, paths
from functrain.tree.mapping import each, leaves_like, map
from functrain.tree.nodes import Tree
from functrain.tree.reductions import joined, wide


def add(a: Tree, b: Tree, *others: Tree) -> Tree:
    """Return the sum of two or more trees, added from the left.

    >>> ft.tree.add({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([10.0, 20.0])})
    {'w': tensor([11., 22.])}
    """
    return map(lambda *terms: functools.reduce(torch.add, terms), a, b, *others, by_kind=True)


def sub(a: Tree, b: Tree) -> Tree:
    """Return a - b.

    >>> before, after = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.5, 1.0])}
    >>> ft.tree.sub(after, before)  # what a step changed
    {'w': tensor([ 0.5000, -1.0000])}
    """
    return map(torch.sub, a, b, by_kind=True)


def mul(a: Tree, b: Tree) -> Tree:
    """Return a * b, leaf by leaf.

    >>> grads, mask = {"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([1.0, 0.0])}
    >>> ft.tree.mul(grads, mask)
    {'w': tensor([3., 0.])}
    """
    return map(torch.mul, a, b, by_kind=True)


def scale(scalar: float | Tensor, tree: Tree) -> Tree:
    """Return scalar * tree; floating-point leaves keep their dtype.

    Shapes: a tensor `scalar` is ().

    >>> ft.tree.scale(0.5, {"w": torch.tensor([10.0, 20.0]), "b": torch.tensor(3.0)})
    {'w': tensor([ 5., 10.]), 'b': tensor(1.5000)}
    """
    _check_scalar("scale", scalar)
    return map(lambda leaf: _times(scalar, leaf), tree, by_kind=True)


def add_scale(a: Tree, scalar: float | Tensor, b: Tree) -> Tree:
    """Return a + scalar * b; where both are floating-point, the dtype is that of a + b.

    Shapes: a tensor `scalar` is ().

    >>> params, grads = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([10.0, 0.0])}
    >>> ft.tree.add_scale(params, -0.01, grads)  # a step of gradient descent
    {'w': tensor([0.9000, 2.0000])}
    """
    _check_scalar("add_scale", scalar)
    return map(lambda x, y: x + _times(scalar, y), a, b, by_kind=True)


def vdot(a: Tree, b: Tree) -> Tensor:
    """Return the sum over all elements of conj(a) * b, a () tensor, at least float32.

    Raises: ValueError, with the path in a note, for leaves of two shapes.

    >>> a = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
    >>> ft.tree.vdot(a, {"w": torch.tensor([4.0, 5.0]), "b": torch.tensor(6.0)})
    tensor(32.)
    """
    first, structure = flatten(a)
    return joined(each(once_a_kind(_product), [first, leaves_like(a, structure, b)], a), torch.sum, 0.0)


def where(condition: Tensor, a: Tree, b: Tree) -> Tree:
    """Return a where the tensor `condition` is true and b elsewhere; traced, never read by the host. A leaf that is the
    same object in both comes back as it is, from a () condition.

    Shapes: `condition` is () or broadcasts with every leaf.

    >>> old, new = {"w": torch.tensor([1.0])}, {"w": torch.tensor([torch.nan])}
    >>> ft.tree.where(torch.isfinite(ft.tree.norm(new)), new, old)  # keep the old params when the new ones are NaN
    {'w': tensor([1.])}
    """
    if not isinstance(condition, Tensor) or condition.dtype != torch.bool:
        came = condition.dtype if isinstance(condition, Tensor) else type(condition).__name__
        raise TypeError(f"where: expected a condition of dtype torch.bool, came {came}; compare first, or use `if`")
    scalar = condition.dim() == 0
    return map(lambda x, y: x if x is y and scalar else torch.where(condition, x, y), a, b, by_kind=True)


def allclose(a: Tree, b: Tree, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = True) -> bool:
    """Tell whether all tensors are close, and other leaves equal; reads the result to the host.

    Tensors of other shapes are not close. Raises: ValueError naming the paths when the structures differ; TypeError
    naming the path of tensors of two dtypes.

    >>> a, b = {"w": torch.tensor([1.0])}, {"w": torch.tensor([1.001])}
    >>> ft.tree.allclose(a, b), ft.tree.allclose(a, b, rtol=0.01)
    (False, True)
    """
    first, structure = flatten(a)
    pairs = list(zip(first, leaves_like(a, structure, b), strict=True))
    for i, (x, y) in enumerate(pairs):
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype != y.dtype:
            raise TypeError(f"allclose: {paths(a)[i]}: expected {x.dtype} in both, came {y.dtype}; use tree.cast first")
    return all(_close(x, y, rtol, atol, equal_nan) for x, y in pairs)


def _close(x: object, y: object, rtol: float, atol: float, equal_nan: bool) -> bool:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x.shape == y.shape and torch.allclose(x, y, rtol=rtol, atol=atol, equal_nan=equal_nan)
    return type(x) is type(y) and x == y


def _times(scalar: float | Tensor, leaf: Tensor) -> Tensor:
    product = leaf * scalar
    if isinstance(scalar, Tensor) and leaf.is_floating_point() and scalar.is_floating_point():
        # torch lets a () scalar decide the dtype when the leaf is () too
        return product.to(leaf.dtype)
    return product


def _check_scalar(what: str, scalar: float | Tensor) -> None:
    if isinstance(scalar, Tensor) and scalar.dim() != 0:
        raise ValueError(f"{what}: expected a scalar of shape (), came {tuple(scalar.shape)}; use tree.map instead")


def _product(x: Tensor, y: Tensor) -> Tensor:
    x, y = wide(x), wide(y)
    if x.shape != y.shape:
        raise ValueError(f"vdot: expected one shape, came {tuple(x.shape)} and {tuple(y.shape)}; expand one")
    return torch.sum(x.conj() * y)
