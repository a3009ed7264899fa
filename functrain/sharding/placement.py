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
        count = mesh.size(axes)
        if size % count:
            others = [e for e, other in enumerate(shape) if other % count == 0 and other and not dims[e]]
            best = max(others, key=lambda e: shape[e], default=None)
            way_out = "leave it whole by P()" if best is None else f"split dimension {best}, of {shape[best]}"
            raise ValueError(
                f"Plan: {path}: expected dimension {d} of {shape} to divide by {count}, the ranks along "
                f"{', '.join(axes)}, came {size}; {way_out}"
            )
    return tuple(dims)


def split_axes(dims: Dims) -> tuple[str, ...]:
    """Return the axes that split a leaf."""
    return tuple(axis for axes in dims for axis in axes)


def part(x: torch.Tensor, dims: Dims, mesh: Mesh) -> torch.Tensor:
    """Return the part of a leaf that this rank has, in memory of its own."""
    for d, axes in enumerate(dims):
        if axes:
            x = x.chunk(mesh.size(axes), d)[mesh.index(axes)]
    return x.clone(memory_format=torch.contiguous_format)
