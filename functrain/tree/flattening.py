"""A tree as its leaves, their paths, and the structure that puts them together again.

optree does it in C++; while `torch.compile` traces, the same is done in Python, at no cost when the graph runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import optree
import torch
from torch import Tensor

from functrain.tree.nodes import NAMESPACE, Tree, below, children, rebuild, signature


def flatten(tree: Tree) -> tuple[list[Any], Any]:
    """Return the leaves, in path order, and the structure that `unflatten` takes.

    >>> leaves, structure = ft.tree.flatten({"w": 1, "b": [2, 3]})
    >>> leaves  # by sorted keys: b, then w
    [2, 3, 1]
    """
    if torch.compiler.is_dynamo_compiling():
        found = leaves(tree)
        return found, _Traced(tree, len(found))
    return optree.tree_flatten(tree, namespace=NAMESPACE)


def unflatten(structure: Any, leaves: Iterable[Any]) -> Tree:
    """Return the tree of this structure with these leaves; the inverse of `flatten`.

    Raises: ValueError for another number of leaves; TypeError for what is no structure.

    >>> leaves, structure = ft.tree.flatten({"w": 1, "b": [2, 3]})
    >>> ft.tree.unflatten(structure, [10 * leaf for leaf in leaves])
    {'w': 10, 'b': [20, 30]}
    """
    given = list(leaves)
    if isinstance(structure, _Traced):
        _check_number(structure.num_leaves, len(given))
        return _put(structure.tree, iter(given))
    if torch.compiler.is_dynamo_compiling():
        raise TypeError(
            "unflatten: expected a structure made inside the compiled function, came one from outside; "
            "pass a tree of that structure in, and use tree.map or tree.structure on it"
        )
    if not isinstance(structure, optree.PyTreeSpec):
        came = type(structure).__name__
        raise TypeError(f"unflatten: expected (structure, leaves) as tree.flatten makes them, came a {came} first")
    _check_number(structure.num_leaves, len(given))
    return optree.tree_unflatten(structure, given)


def leaves(tree: Tree) -> list[Any]:
    """Return the leaves in path order.

    >>> ft.tree.leaves({"w": 1, "b": [2, 3]})
    [2, 3, 1]
    """
    if torch.compiler.is_dynamo_compiling():
        found: list[Any] = []
        _collect(tree, found)
        return found
    return optree.tree_leaves(tree, namespace=NAMESPACE)


def structure(tree: Tree) -> Any:
    """Return the structure of a tree; two structures compare with ==.

    >>> ft.tree.structure({"w": 1, "b": [2, 3]}) == ft.tree.structure({"b": [4, 5], "w": 6})
    True
    """
    if torch.compiler.is_dynamo_compiling():
        return _Traced(tree, len(leaves(tree)))
    return optree.tree_structure(tree, namespace=NAMESPACE)


def items(tree: Tree) -> list[tuple[str, Any]]:
    """Return (path, leaf) pairs in path order; the path of a tree that is one leaf is the empty string.

    Raises: ValueError for dictionary keys whose path would be ambiguous.

    >>> ft.tree.items({"blocks": [{"weight": 1, "bias": 2}], "head": 3})
    [('blocks/0/bias', 2), ('blocks/0/weight', 1), ('head', 3)]
    """
    pairs = children(tree)
    if pairs is None:
        return [("", tree)]
    found: list[tuple[str, Any]] = []
    _name(pairs, "", found)
    return found


def paths(tree: Tree) -> list[str]:
    """Return the leaves' paths, in the order of `leaves`.

    >>> ft.tree.paths({"blocks": [{"weight": 1, "bias": 2}], "head": 3})
    ['blocks/0/bias', 'blocks/0/weight', 'head']
    """
    return [path for path, _ in items(tree)]


def _name(pairs: list[tuple[str, Tree]], prefix: str, found: list[tuple[str, Any]]) -> None:
    for name, child in pairs:
        path = prefix + name
        # a call for each node, not for each leaf: Dynamo takes a millisecond to trace a call
        inside = None if isinstance(child, Tensor) else children(child)
        if inside is None:
            found.append((path, child))
        else:
            _name(inside, path + "/", found)


class _Traced:
    """A structure while `torch.compile` traces: optree 0.20 keeps dictionary keys in a class that Dynamo cannot
    build, so inside a graph a tree stands for its own structure."""

    def __init__(self, tree: Tree, num_leaves: int) -> None:
        self.tree = tree
        self.num_leaves = num_leaves

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Traced) and _same(self.tree, other.tree)

    def __hash__(self) -> int:
        return hash(self.num_leaves)


def _same(a: Tree, b: Tree) -> bool:
    kind = signature(a)
    if kind != signature(b):
        return False
    if kind is None:
        return True
    for x, y in zip(below(a) or (), below(b) or (), strict=True):
        if not (isinstance(x, Tensor) and isinstance(y, Tensor)) and not _same(x, y):
            return False
    return True


def _collect(node: Tree, found: list[Any]) -> None:
    inside = below(node)
    if inside is None:
        found.append(node)
        return
    for child in inside:
        if isinstance(child, Tensor):
            found.append(child)
        else:
            _collect(child, found)


def _put(node: Tree, given: Iterator[Any]) -> Tree:
    inside = below(node)
    if inside is None:
        return next(given)
    return rebuild(node, [next(given) if isinstance(child, Tensor) else _put(child, given) for child in inside])


def _check_number(expected: int, came: int) -> None:
    if expected != came:
        raise ValueError(f"unflatten: expected {expected} leaves, came {came}; pass one for each path of the structure")
