"""Which mesh axes split which dimension of which leaf."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from functrain import tree
from functrain.sharding.mesh import Mesh
from functrain.tree.selection import Pattern

Dims: TypeAlias = tuple[tuple[str, ...], ...]  # for each dimension of a leaf the axes that split it
Rule: TypeAlias = "tuple[str, P | Largest]"


class P(tuple[Any, ...]):
    """For each dimension of a leaf what splits it: None, an axis of the mesh, or several. As JAX's `PartitionSpec`.

    Dimensions that are left out are whole, so `P()` is a leaf that every rank has.

    >>> ft.sharding.P(None, "fsdp")
    P(None, 'fsdp')
    """

    def __new__(cls, *dims: str | Sequence[str] | None) -> P:
        return super().__new__(cls, dims)

    def __repr__(self) -> str:
        return f"P({', '.join(map(repr, self))})"


class Parts(str):
    """An axis that splits each of several equal parts of a dimension; see `parts`."""

    groups: int

    def __repr__(self) -> str:
        return f"parts({str(self)!r}, {self.groups})"


def parts(axis: str, count: int) -> Parts:
    """Return for a `P` that each of `count` equal parts of a dimension is split, so that every rank has some of each:
    of a weight whose columns are queries, keys and values one after another, heads of all three.

    >>> ft.sharding.P("fsdp", ft.sharding.parts("tensor", 3))
    P('fsdp', parts('tensor', 3))
    """
    if type(count) is not int or count < 2:
        raise ValueError(f"parts: expected 2 parts or more, came {count!r}; write the name of the axis alone for one")
    found = Parts(axis)
    found.groups = count
    return found


class Where:
    """A path for an error: layers that differ in nothing else are of one structure."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Where)

    def __hash__(self) -> int:
        return 0


class Largest:
    """The rule that `largest` returns."""

    def __init__(self, axes: str | Sequence[str]) -> None:
        self.axes = (axes,) if isinstance(axes, str) else tuple(axes)

    def __repr__(self) -> str:
        return f"largest({', '.join(map(repr, self.axes))})"


def largest(axes: str | Sequence[str]) -> Largest:
    """Return the rule that splits the largest dimension of a leaf that divides by the ranks along the axes, and leaves
    one whole that has none.

    >>> ft.sharding.largest("fsdp")
    largest('fsdp')
    """
    return Largest(axes)


def resolved(params: tree.Tree, rules: Sequence[Rule], mesh: Mesh) -> dict[str, Dims]:
    """Return for each path what splits its dimensions.

    Raises: ValueError for a path that no rule fits, or two of them, but for a "**" at their end that takes the rest;
    for an axis that the mesh does not have, or that is twice in a leaf; for more dimensions than a leaf has, and one
    that does not divide.
    """
    patterns = [(Pattern(text), rule) for text, rule in rules]
    found = {}
    for path, leaf in tree.items(params):
        fitting = [(p.text, rule) for p, rule in patterns if p.fits(path)]
        if len(fitting) > 1 and fitting[-1][0] == "**":
            fitting = fitting[:-1]
        if len(fitting) != 1:
            came = "none" if not fitting else ", ".join(repr(text) for text, _ in fitting)
            way_out = 'add ("**", P()) at the end of the rules' if not fitting else "make one of them narrower"
            raise ValueError(f"Plan: {path}: expected one rule that fits, came {came}; {way_out}")
        found[path] = _dims(path, tuple(leaf.shape), fitting[0][1], mesh)
    return found


def _dims(path: str, shape: tuple[int, ...], rule: P | Largest, mesh: Mesh) -> Dims:
    if isinstance(rule, Largest):
        axes, count = mesh.ordered(rule.axes), mesh.size(rule.axes)
        fitting = [d for d, size in enumerate(shape) if size % count == 0 and size]
        chosen = max(fitting, key=lambda d: shape[d], default=None)
        return tuple(axes if d == chosen else () for d in range(len(shape)))
    if len(rule) > len(shape):
        raise ValueError(
            f"Plan: {path}: expected at most {len(shape)} dimensions, as of its shape {shape}, came {rule!r}; "
            "leave out the last"
        )
    dims = [mesh.ordered(() if axes is None else axes) for axes in rule]
    dims += [()] * (len(shape) - len(dims))
    flat = [axis for axes in dims for axis in axes]
    for axis in flat:
        if flat.count(axis) > 1:
            raise ValueError(f"Plan: {path}: expected each axis at one dimension, came {axis!r} twice in {rule!r}")
    for d, (size, axes) in enumerate(zip(shape, dims, strict=True)):
        grouped = [axis for axis in axes if isinstance(axis, Parts)]
        if grouped and len(axes) > 1:
            raise ValueError(f"Plan: {path}: expected {grouped[0]!r} alone at its dimension, came {rule!r}")
        count = mesh.size(axes) * (grouped[0].groups if grouped else 1)
        if size % count:
            others = [e for e, other in enumerate(shape) if other % count == 0 and other and not dims[e]]
            best = max(others, key=lambda e: shape[e], default=None)
            way_out = "leave it whole by P()" if best is None else f"split dimension {best}, of {shape[best]}"
            raise ValueError(
                f"Plan: {path}: expected dimension {d} of {shape} to divide by {count}, the ranks along "
                f"{', '.join(axes)}{' in each part' if grouped else ''}, came {size}; {way_out}"
            )
    return tuple(dims)


def split_axes(dims: Dims) -> tuple[str, ...]:
    """Return the axes that split a leaf."""
    return tuple(axis for axes in dims for axis in axes)


def part(x: torch.Tensor, dims: Dims, mesh: Mesh, rank: int | None = None) -> torch.Tensor:
    """Return the part of a leaf that a rank has, by default this one, in memory of its own."""
    for d, axes in enumerate(dims):
        if axes:
            groups = axes[0].groups if isinstance(axes[0], Parts) else 1
            x = x.unflatten(d, (groups, -1)).chunk(mesh.size(axes), d + 1)[mesh.index(axes, rank)].flatten(d, d + 1)
    return x.clone(memory_format=torch.contiguous_format)
