"""A function applied at every path of one or several trees of one structure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from functrain.tree.by_kind import once_a_kind
from functrain.tree.flattening import flatten, items, paths, structure, unflatten
from functrain.tree.hints import listed
from functrain.tree.nodes import Tree, children, signature


def map(fn: Callable[..., Any], tree: Tree, *rest: Tree, by_kind: bool = False) -> Tree:
    """Return the tree of `fn(leaf, *leaves of rest at the same path)`.

    With `by_kind`, `fn` promises to do the same to all leaves of one shape, strides, dtype and device: it has no state
    and writes to nothing. `ft.compile` then runs it once for leaves of one kind, which makes a large tree's first step
    faster. Without it, as everywhere in eager, `fn` runs for each leaf.
    Raises: ValueError naming the paths that differ when the trees have different structures; what `fn` raises, with
    a note that names the path.

    >>> params, grads = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, 0.0])}
    >>> ft.tree.map(lambda p, g: p - 0.5 * g, params, grads)
    {'w': tensor([0.5000, 2.0000])}
    """
    first, treedef = flatten(tree)
    columns = [first, *(leaves_like(tree, treedef, other) for other in rest)]
    return unflatten(treedef, each(once_a_kind(fn) if by_kind else fn, columns, tree))


def map_with_path(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Return the tree of `fn(path, leaf, *leaves of rest at the same path)`; errors as those of `map`.

    >>> grads = {"embedding": torch.ones(2), "head": torch.ones(2)}
    >>> ft.tree.map_with_path(lambda path, g: 0.0 * g if path.startswith("embedding") else g, grads)
    {'embedding': tensor([0., 0.]), 'head': tensor([1., 1.])}
    """
    first, treedef = flatten(tree)
    columns = [paths(tree), first, *(leaves_like(tree, treedef, other) for other in rest)]
    return unflatten(treedef, each(fn, columns, tree))


def leaves_like(tree: Tree, treedef: Any, other: Tree) -> list[Any]:
    """Return the leaves of `other`, whose structure must be `treedef`, that of `tree`."""
    found, other_def = flatten(other)
    if other_def != treedef:
        check_same_structure(tree, other)
    return found


def each(fn: Callable[..., Any], columns: list[list[Any]], tree: Tree) -> list[Any]:
    """Return `fn` of every row of the columns; what it raises gets a note with the path in `tree`."""
    if torch.compiler.is_dynamo_compiling():
        return [fn(*row) for row in zip(*columns, strict=True)]
    made: list[Any] = []
    try:
        for row in zip(*columns, strict=True):
            made.append(fn(*row))
    except Exception as error:
        error.add_note(f"at {paths(tree)[len(made)] or 'the root'} of the tree")
        raise
    return made


def check_same_structure(expected: Tree, got: Tree, *, what: str = "trees") -> None:
    """Raise a ValueError that names the paths in which two trees differ; return when their structures are equal.

    >>> ft.tree.check_same_structure({"weight": 1, "bias": 2}, {"weight": 1, "bais": 2}, what="params")
    Traceback (most recent call last):
        ...
    ValueError: params: expected one structure, came two; make the second like the first
      missing: 'bias' (did you mean 'bais'?)
      unexpected: 'bais' (did you mean 'bias'?)
    """
    if structure(expected) == structure(got):
        return
    want, have = [path for path, _ in items(expected)], [path for path, _ in items(got)]
    known, came = set(want), set(have)
    missing, extra = [p for p in want if p not in came], [p for p in have if p not in known]
    lines = [f"{what}: expected one structure, came two; make the second like the first"]
    if missing:
        lines.append("  missing: " + listed(missing, extra))
    if extra:
        lines.append("  unexpected: " + listed(extra, missing))
    if not missing and not extra:
        lines += _other_nodes(expected, got, "")[:8]
    raise ValueError("\n".join(lines))


def _other_nodes(a: Tree, b: Tree, path: str) -> list[str]:
    """Describe the nodes that differ in trees whose leaves have the same paths."""
    if signature(a) != signature(b):
        return [f"  {path or 'the root'}: expected {_described(a)}, came {_described(b)}"]
    found: list[str] = []
    for (name, x), (_, y) in zip(children(a) or (), children(b) or (), strict=True):
        found += _other_nodes(x, y, f"{path}/{name}" if path else name)
    return found


def _described(node: Tree) -> str:
    kind = signature(node)
    if kind is None:
        return "a leaf"
    names = ", ".join(str(name) for name, _ in children(node) or ())
    static = f" and {kind[2]!r}" if len(kind) > 2 else ""
    return f"{kind[0].__name__}({names}){static}"
