"""Tensors that wrap tensors, such as DTensor: a function of them is compiled as one of what they wrap.

They never enter a trace as arguments: a function is called with their plain tensors, and puts them together inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from functrain import tree
from functrain.compiler.donation import consumed_kind


class Wrapper(NamedTuple):
    """How a tensor is put together of a plain one."""

    kind: type
    name: str
    others: tuple[tuple[str, Any], ...]  # what else it is made of, such as a mesh of devices
    context: Any
    size: torch.Size
    strides: tuple[int, ...]

    def around(self, plain: Tensor) -> Tensor:
        found: Tensor = self.kind.__tensor_unflatten__(  # type: ignore[attr-defined]
            {self.name: plain, **dict(self.others)}, self.context, self.size, self.strides
        )
        return found


def is_wrapper(leaf: Any) -> bool:
    return type(leaf) is not Tensor and isinstance(leaf, Tensor) and is_traceable_wrapper_subclass(leaf)


def apart(leaves: Sequence[Any]) -> tuple[list[Any], tuple[Wrapper | None, ...]]:
    """Return plain tensors in the place of those that wrap them, and how they are put together.

    Raises: TypeError for one that wraps several.
    """
    plain: list[Any] = []
    how: list[Wrapper | None] = []
    for leaf in leaves:
        if not is_wrapper(leaf):
            plain.append(leaf)
            how.append(None)
            continue
        names, context = leaf.__tensor_flatten__()
        inner = {name: getattr(leaf, name) for name in names}
        tensors = [name for name, value in inner.items() if isinstance(value, Tensor)]
        if len(tensors) != 1 or is_wrapper(inner[tensors[0]]):
            raise TypeError(f"ft.compile: expected tensors that wrap one plain tensor, came {type(leaf).__name__}")
        plain.append(inner.pop(tensors[0]))
        how.append(Wrapper(type(leaf), tensors[0], tuple(inner.items()), context, leaf.shape, leaf.stride()))
    return plain, tuple(how)


@dataclass(frozen=True)
class How:
    """How a tree, or several, are put together of the plain tensors of their leaves."""

    structures: tuple[Any, ...]
    wrappers: tuple[tuple[Wrapper | None, ...], ...]

    def together(self, rows: Sequence[Sequence[Any]]) -> list[Any]:
        found = []
        for structure, wrappers, plain in zip(self.structures, self.wrappers, rows, strict=True):
            leaves = [x if wrapper is None else wrapper.around(x) for x, wrapper in zip(plain, wrappers, strict=True)]
            found.append(tree.unflatten(structure, leaves))
        return found


def apart_all(trees: Sequence[Any]) -> tuple[list[list[Any]], How]:
    """Return the plain tensors of each tree, and how the trees are put together."""
    flat = [tree.flatten(each) for each in trees]
    rows = [apart(leaves) for leaves, _ in flat]
    return [plain for plain, _ in rows], How(tuple(s for _, s in flat), tuple(how for _, how in rows))


class OfParts:
    """A compiled function of tensors that wrap others."""

    def __init__(self, fn: Callable[..., Any], donate: bool, compiled: Callable[[Callable[..., Any]], Any]) -> None:
        self._fn, self._donate = fn, donate
        self._compiled = compiled(self._plain)
        self._traced: How | None = None  # of what the function returned when it was traced last
        self._made: dict[Any, How] = {}  # by program

    def _plain(self, first: list[Any], rest: list[list[Any]], how: How) -> Any:
        result = self._fn(*how.together([first, *rest]))
        rows, self._traced = apart_all(result if self._donate else [result])
        return (rows[0], rows[1:]) if self._donate else rows

    def __call__(self, args: tuple[Any, ...]) -> Any:
        (first, *rest), how = apart_all(args)
        found = self._compiled(first, rest, how)
        program = self._compiled.last
        if program not in self._made:
            assert self._traced is not None
            self._made[program] = self._traced
        if not self._donate:
            return self._made[program].together(found)[0]
        for leaf in tree.leaves(args[0]):
            if is_wrapper(leaf):
                kind: Any = type(leaf)
                leaf.__class__ = consumed_kind(kind)
        return tuple(self._made[program].together([found[0], *found[1]]))

    def describe(self, args: tuple[Any, ...]) -> str:
        (first, *rest), how = apart_all(args)
        return str(self._compiled.describe(first, rest, how))
