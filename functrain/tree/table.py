"""A tree to look at: how large it is, and a table of its leaves."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from functrain.tree.flattening import items, leaves
from functrain.tree.nodes import Tree
from functrain.tree.selection import Where, mask

_HEADER = ("path", "shape", "dtype", "bytes", "trainable")
_WIDEST = 40  # characters of a leaf that is no tensor


def size(tree: Tree) -> int:
    """Return the number of elements in all tensors, a tied tensor counted once.

    >>> ft.tree.size({"w": torch.ones(2, 3), "b": torch.ones(3)})
    9
    """
    return sum([leaf.numel() for leaf in _tensors(tree)])


def bytes(tree: Tree) -> int:
    """Return the number of bytes in all tensors, a tied tensor counted once.

    >>> ft.tree.bytes({"w": torch.ones(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)})
    30
    """
    return sum([leaf.numel() * leaf.element_size() for leaf in _tensors(tree)])


def format(tree: Tree, *, trainable: Where = "**") -> str:
    """Return a table of path, shape, dtype, bytes and whether the leaf is trainable, with a line of totals.

    Trainable are floating-point and complex tensors that `trainable` names: a pattern, several, or a predicate.

    >>> print(ft.tree.format({"w": torch.ones(2, 3), "b": torch.ones(3)}, trainable="w"))
    path   shape       dtype    bytes  trainable
    b      (3,)        float32     12  no
    w      (2, 3)      float32     24  yes
    total  9 elements              36
    """
    pairs = items(tree)
    chosen = leaves(mask(trainable, tree)) if pairs else []
    rows = [_HEADER, *[_row(path, leaf, fits) for (path, leaf), fits in zip(pairs, chosen, strict=True)]]
    rows.append(("total", f"{size(tree):,} elements", "", f"{bytes(tree):,}", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join([_line(row, widths) for row in rows])


def _tensors(tree: Tree) -> list[Tensor]:
    """The tensors of a tree, each object once."""
    return list({id(leaf): leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)}.values())


def _row(path: str, leaf: Any, fits: bool) -> tuple[str, str, str, str, str]:
    if not isinstance(leaf, Tensor):
        text = " ".join(repr(leaf).split())
        return path, text if len(text) <= _WIDEST else text[: _WIDEST - 3] + "...", type(leaf).__name__, "", ""
    dtype, count = str(leaf.dtype).removeprefix("torch."), f"{leaf.numel() * leaf.element_size():,}"
    floats = leaf.is_floating_point() or leaf.is_complex()
    return path, str(tuple(leaf.shape)), dtype, count, "yes" if fits and floats else "no"


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    path, shape, dtype, count, trainable = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
    return "  ".join([path, shape, dtype, count.strip().rjust(widths[3]), trainable]).rstrip()
