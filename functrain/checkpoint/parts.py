"""Leaves of which each rank saves and loads a part.

The node of such a leaf has `split`, the number of parts along each dimension, all of one shape. A part stands in some
file under the name of the leaf and its own place, as `params/w/2.0/`, which is no path.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.checkpoint.description import Node
from functrain.sharding.pieces import cut_of

MAX_PARTS = 2**20  # of one leaf: more than anybody has ranks


class Box(NamedTuple):
    """A part of a tensor: where it begins, and its shape."""

    begin: tuple[int, ...]
    shape: tuple[int, ...]

    def common(self, other: Box) -> Box | None:
        """Return what two boxes have in common, None for nothing."""
        begin = tuple(map(max, self.begin, other.begin))
        end = tuple(map(min, self.end, other.end))
        shape = tuple(b - a for a, b in zip(begin, end, strict=True))
        return Box(begin, shape) if all(size > 0 for size in shape) else None

    @property
    def end(self) -> tuple[int, ...]:
        return tuple(a + n for a, n in zip(self.begin, self.shape, strict=True))

    def within(self, other: Box) -> tuple[slice, ...]:
        """Return which elements of a tensor that is the other box this one is."""
        return tuple(slice(a - b, a - b + n) for a, b, n in zip(self.begin, other.begin, self.shape, strict=True))


class Piece(NamedTuple):
    """One tensor of the files: a leaf, or a part of one."""

    node: Node
    box: Box

    @property
    def is_whole(self) -> bool:
        return "split" not in self.node


def boxes_of(leaf: Any) -> tuple[tuple[Box, tuple[int, ...]], ...]:
    """Return which pieces of a split leaf this rank has, and where each begins here. Raises: ValueError as `cut_of`."""
    counts, pieces, _ = cut_of(leaf)
    shape = tuple(size // n for size, n in zip(leaf.shape, counts, strict=True))
    return tuple(
        (Box(tuple(i * size for i, size in zip(place, shape, strict=True)), shape), tuple(part.start for part in here))
        for place, here in pieces
    )


def name_of(tensor: str, place: Sequence[int]) -> str:
    """Return the name of a part in the files; no path ends so."""
    return f"{tensor}/{'.'.join(map(str, place))}/"


def pieces(nodes: Mapping[str, Node]) -> Iterator[tuple[str, Piece]]:
    """Give what the files must hold, by name, of the nodes of tensors by name."""
    for name, node in nodes.items():
        shape, counts = tuple(node["shape"]), node.get("split")
        if counts is None:
            yield name, Piece(node, Box((0,) * len(shape), shape))
            continue
        each = tuple(size // count for size, count in zip(shape, counts, strict=True))
        for place in itertools.product(*map(range, counts)):
            begin = tuple(i * size for i, size in zip(place, each, strict=True))
            yield name_of(name, place), Piece(node, Box(begin, each))


def count(nodes: Mapping[str, Node]) -> int:
    """Count what `pieces` gives."""
    return sum(math.prod(node.get("split", ())) for node in nodes.values())


def is_split_well(shape: Sequence[int], counts: Any) -> bool:
    """Tell whether a shape divides into so many parts."""
    if not isinstance(counts, list) or len(counts) != len(shape):
        return False
    if not all(type(n) is int and n >= 1 and size % n == 0 for n, size in zip(counts, shape, strict=True)):
        return False
    return 1 < math.prod(counts) <= MAX_PARTS


def room(shape: Sequence[int], like: Sequence[int] | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory of a shape, whose dimensions follow each other as in a tensor with the strides `like`."""
    if like is None:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    order = sorted(range(len(shape)), key=lambda d: (-like[d], d))
    back = [order.index(d) for d in range(len(shape))]
    return torch.empty([shape[d] for d in order], dtype=dtype, device=device).permute(back)
