"""Some of the leaves: those whose path fits a pattern, or that a predicate chooses."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from functrain.tree.flattening import flatten, items, unflatten
from functrain.tree.hints import instead
from functrain.tree.nodes import Tree, below, children, rebuild, signature
from functrain.tree.surgery import PathError

Where: TypeAlias = str | Sequence[str] | Callable[[str, Any], bool]


def select(tree: Tree, *patterns: str) -> dict[str, Any]:
    """Return the leaves whose path fits any pattern, by path. `*` stops at "/", `**` does not, `?` is one character.

    Raises: PathError, a KeyError, for a pattern that fits no path.

    >>> params = {"blocks": [{"weight": 1, "bias": 2}, {"weight": 3, "bias": 4}], "head": 5}
    >>> ft.tree.select(params, "blocks/*/bias", "head")
    {'blocks/0/bias': 2, 'blocks/1/bias': 4, 'head': 5}
    """
    pairs = items(tree)
    chosen = _chosen(patterns, pairs)
    return {path: leaf for (path, leaf), fits in zip(pairs, chosen, strict=True) if fits}


def mask(where: Where, tree: Tree) -> Tree:
    """Return the tree of booleans that says which leaves fit a pattern, any of several patterns, or a predicate of
    (path, leaf).

    >>> params = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    >>> ft.tree.mask(lambda path, leaf: leaf.dim() > 1, params)  # matrices alone, for weight decay
    {'weight': True, 'bias': False}
    """
    return unflatten(flatten(tree)[1], _chosen(where, items(tree)))


def partition(where: Where, tree: Tree) -> tuple[Tree, Tree]:
    """Split a tree in two of the same containers: leaves that fit, and the others; None stands in the holes.

    Equals the tree again under `combine`.

    >>> trained, frozen = ft.tree.partition("head/**", {"backbone": {"w": 1}, "head": {"w": 2}})
    >>> trained
    {'backbone': {'w': None}, 'head': {'w': 2}}
    >>> frozen
    {'backbone': {'w': 1}, 'head': {'w': None}}
    """
    leaves, structure = flatten(tree)
    rows = list(zip(_chosen(where, items(tree)), leaves, strict=True))
    hit = unflatten(structure, [leaf if fits else None for fits, leaf in rows])
    return hit, unflatten(structure, [None if fits else leaf for fits, leaf in rows])


def combine(first: Tree, second: Tree) -> Tree:
    """Fill the None holes of `first` with what `second` has there; the inverse of `partition`.

    Raises: ValueError naming the path when both have a leaf there, or other containers.

    >>> ft.tree.combine({"backbone": None, "head": 2}, {"backbone": 1, "head": None})
    {'backbone': 1, 'head': 2}
    """
    return _combine(first, second, "")


class Pattern:
    """A pattern of `select`, made ready, for many paths."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._regex = _regex(text)

    def fits(self, path: str) -> bool:
        """Tell whether a path fits."""
        return self._regex.fullmatch(path) is not None

    def error(self, paths: list[str]) -> PathError:
        """Say that none of these paths fits."""
        return PathError(f"{self.text}: this pattern fits no path; there is {instead(self.text, paths)}")


def _combine(first: Tree, second: Tree, path: str) -> Tree:
    if first is None:
        return second
    if second is None:
        return first
    kind = signature(first)
    if kind is None or kind != signature(second):
        raise ValueError(
            f"combine: {path or 'the root'}: expected None in one of the trees or the same container in both, came "
            f"{_described(first)} and {_described(second)}; tree.partition makes trees that fit"
        )
    below_second = below(second) or ()
    made = []
    for (name, a), b in zip(children(first) or (), below_second, strict=True):
        made.append(_combine(a, b, f"{path}/{name}" if path else name))
    return rebuild(first, made)


def _described(node: Tree) -> str:
    if isinstance(node, Tensor):
        return f"a tensor {node.dtype} {tuple(node.shape)}"
    return f"a {type(node).__name__}"


def _chosen(where: Where, pairs: list[tuple[str, Any]]) -> list[bool]:
    if callable(where):
        return [bool(where(path, leaf)) for path, leaf in pairs]
    chosen = [False] * len(pairs)
    for pattern in [where] if isinstance(where, str) else where:
        fitting = Pattern(pattern)
        fits = [fitting.fits(path) for path, _ in pairs]
        if True not in fits:
            raise fitting.error([path for path, _ in pairs])
        chosen = [old or new for old, new in zip(chosen, fits, strict=True)]
    return chosen


def _regex(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*|\*|\?)", pattern)
    wild = {"**": ".*", "*": "[^/]*", "?": "[^/]"}
    # DOTALL: a key may hold a line break
    return re.compile("".join([wild.get(part, re.escape(part)) for part in parts]), re.DOTALL)
