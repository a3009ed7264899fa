"""Dataclasses as nodes, and what other libraries return."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar, dataclass_transform, overload

import optree

from functrain.tree.nodes import NAMESPACE, is_registered

T = TypeVar("T")


def register_dataclass(cls: type[T], *, static: Sequence[str] = ()) -> type[T]:
    """Make a dataclass a tree node: its fields are children, those named in `static` are part of the structure.

    Static fields must have == and, to key a compiled program, a hash. A tree puts the class together again without
    `__init__` and `__post_init__`, because its leaves may be anything: gradients, booleans, None.
    Raises: TypeError when `cls` is no dataclass; ValueError for a static name that is no field, and for a class that
    is a node already.

    >>> import dataclasses
    >>> @dataclasses.dataclass
    ... class Moments:
    ...     mean: torch.Tensor
    ...     var: torch.Tensor
    >>> ft.tree.paths(ft.tree.register_dataclass(Moments)(torch.zeros(2), torch.ones(2)))
    ['mean', 'var']
    """
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise TypeError(f"register_dataclass: expected a dataclass, came {cls!r}; use @tree.dataclass")
    if isinstance(static, str):
        raise TypeError(f"register_dataclass: expected static names, came {static!r}; write ({static!r},)")
    names = [field.name for field in dataclasses.fields(cls)]
    unknown = [name for name in static if name not in names]
    if unknown:
        raise ValueError(f"register_dataclass: {cls.__name__} has no field {unknown}; its fields are {names}")
    if optree.register_pytree_node.get(cls, namespace=NAMESPACE) is not None:
        raise ValueError(f"register_dataclass: {cls.__name__} is a tree node already; register it once")
    dynamic = tuple(name for name in names if name not in static)
    fixed = tuple(static)

    def to_children(node: T) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[str, ...]]:
        return tuple([getattr(node, n) for n in dynamic]), tuple([getattr(node, n) for n in fixed]), dynamic

    def from_children(metadata: tuple[Any, ...], children: Iterable[Any]) -> T:
        new = object.__new__(cls)
        for name, value in zip(dynamic + fixed, (*children, *metadata), strict=True):
            object.__setattr__(new, name, value)  # the class may be frozen
        return new

    optree.register_pytree_node(cls, to_children, from_children, namespace=NAMESPACE)  # type: ignore
    return cls


@overload
@dataclass_transform(frozen_default=True)
def dataclass(cls: type[T]) -> type[T]: ...
@overload
@dataclass_transform(frozen_default=True)
def dataclass(*, static: Sequence[str] = ()) -> Callable[[type[T]], type[T]]: ...
def dataclass(cls: type[T] | None = None, *, static: Sequence[str] = ()) -> Any:
    """Decorate a class as a frozen dataclass that is a tree node; see `register_dataclass`.

    >>> @ft.tree.dataclass(static=("heads",))
    ... class Attention:
    ...     qkv: torch.Tensor
    ...     heads: int
    >>> ft.tree.map(lambda leaf: 2 * leaf, Attention(torch.ones(2), heads=4))
    Attention(qkv=tensor([2., 2.]), heads=4)
    """

    def decorate(inner: type[T]) -> type[T]:
        return register_dataclass(dataclasses.dataclass(frozen=True)(inner), static=static)

    return decorate if cls is None else decorate(cls)


def register_outputs() -> None:
    """Make the dataclasses that are ordered dicts tree nodes, as transformers' `ModelOutput`s are: of entries by name.

    Those that Python has imported by now; what is a node already stays as it is.
    """
    found = [*OrderedDict.__subclasses__()]
    for cls in found:
        found += cls.__subclasses__()
        if dataclasses.is_dataclass(cls) and not is_registered(cls):
            optree.register_pytree_node(cls, _entries, partial(_output, cls), namespace=NAMESPACE)


def _entries(output: Any) -> tuple[tuple[Any, ...], tuple[str, ...], tuple[str, ...]]:
    return tuple(output.values()), tuple(output), tuple(output)


def _output(cls: Any, names: tuple[str, ...], values: Iterable[Any]) -> Any:
    new = cls.__new__(cls)  # without __post_init__, which looks for a mistake of the caller in what is no tensor
    for field in dataclasses.fields(cls):
        object.__setattr__(new, field.name, None)
    for name, value in zip(names, values, strict=True):
        OrderedDict.__setitem__(new, name, value)
        object.__setattr__(new, name, value)
    return new
