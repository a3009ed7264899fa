"""What a node is: the containers of a tree, the children of each in traversal order, and the names of the children.

These functions look at one node; they trace under `torch.compile`, and agree with optree, which flattens whole trees
when nothing is traced.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any, TypeAlias

import optree
from torch import Tensor

Tree: TypeAlias = Any
Params: TypeAlias = Any
Batch: TypeAlias = Any

NAMESPACE = "functrain"  # of optree's registry, where dataclasses become nodes


def children(node: Tree) -> list[tuple[str, Tree]] | None:
    """Return a node's (name, child) pairs in traversal order, or None for a leaf.

    Raises: ValueError for a dictionary key that cannot stand in a path.

    >>> ft.tree.children({"w": 3, "b": [1, 2]})
    [('b', [1, 2]), ('w', 3)]
    >>> ft.tree.children(torch.ones(2)) is None
    True
    """
    if isinstance(node, Tensor):
        return None
    if isinstance(node, dict) and type(node) in (dict, OrderedDict, defaultdict):
        keys = _keys(node)
        _check_keys(node)
        return [(str(key), node[key]) for key in keys]
    inside = below(node)
    return None if inside is None else list(zip(_names(node, inside), inside, strict=True))


def below(node: Tree) -> Sequence[Tree] | None:
    """Return a node's children in traversal order, or None for a leaf."""
    kind = type(node)
    if kind is dict or kind is defaultdict or kind is OrderedDict:
        return [node[key] for key in _keys(node)]
    if kind is list or kind is tuple or (isinstance(node, tuple) and hasattr(kind, "_fields")):
        return node
    if node is None:
        return ()
    registered = None if isinstance(node, Tensor) else _registered(kind)
    return None if registered is None else list(registered.flatten_func(node)[0])


def rebuild(node: Tree, made: list[Tree]) -> Tree:
    """Return a node like this one with other children; `made` is in the order of `below`."""
    kind = type(node)
    if kind is dict or kind is defaultdict:
        new = dict(zip(_keys(node), made, strict=True))
        rows = {key: new[key] for key in node}  # the order of insertion: torch.compile would compile again for another
        return rows if kind is dict else defaultdict(node.default_factory, rows)
    if kind is OrderedDict:
        return OrderedDict(zip(node, made, strict=True))
    if kind is list or kind is tuple:
        return kind(made)
    if node is None:
        return None
    if isinstance(node, tuple) and hasattr(kind, "_fields"):
        return kind(*made)
    registered = _registered(kind)
    return registered.unflatten_func(registered.flatten_func(node)[1], made)


def signature(node: Tree) -> tuple[Any, ...] | None:
    """Return what of a node two equal structures share: its type, keys, length and static fields; None for a leaf."""
    kind = type(node)
    if kind is dict or kind is OrderedDict:
        return (kind, _keys(node))
    if kind is defaultdict:
        return (kind, _keys(node), node.default_factory)
    inside = below(node)
    if inside is None:
        return None
    if node is None or isinstance(node, (list, tuple)):
        return (kind, len(inside))
    return (kind, len(inside), _registered(kind).flatten_func(node)[1])


def is_registered(kind: type) -> bool:
    """Tell whether a class is a node because `register_dataclass`, or optree, was told so."""
    return _registered(kind) is not None


def _registered(kind: type) -> Any:
    return optree.register_pytree_node.get(kind, namespace=NAMESPACE)


def _keys(node: dict[Any, Any]) -> list[Any]:
    if type(node) is OrderedDict:
        return list(node)
    try:
        return sorted(node)
    except TypeError:  # int and str beside each other: by type, then by value, as optree sorts
        return sorted(node, key=lambda key: (f"{type(key).__module__}.{type(key).__qualname__}", key))


def _check_keys(node: dict[Any, Any]) -> None:
    for key in node:
        if type(key) is str:
            if key == "" or "/" in key:
                raise ValueError(f"tree: expected a key without '/' that is not empty, came {key!r}; rename it")
        elif type(key) is not int:
            came = f"{key!r} of type {type(key).__name__}"
            raise ValueError(f"tree: expected dictionary keys of type str or int, came {came}; convert it")
        elif str(key) in node:
            raise ValueError(f"tree: keys {key!r} and {str(key)!r} of one dictionary have one path; rename one of them")


def _names(node: Tree, inside: Sequence[Tree]) -> Sequence[str]:
    kind = type(node)
    if isinstance(node, tuple) and hasattr(kind, "_fields"):
        return tuple(kind._fields)
    if node is not None and kind is not list and kind is not tuple:
        found = _registered(kind).flatten_func(node)
        if len(found) > 2 and found[2] is not None:
            return [str(name) for name in found[2]]
    return [str(i) for i in range(len(inside))]
