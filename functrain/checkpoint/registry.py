"""Descriptions back to trees, with the types that this process knows.

Nothing is imported for a file's sake: a NamedTuple or dataclass comes back only as a type that was registered here, or
is functrain's own.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar, overload

from functrain.checkpoint.description import (
    FACTORIES,
    REGISTERED_NAMES,
    Node,
    is_namedtuple,
    named_items,
    scalar,
    type_name,
)
from functrain.checkpoint.errors import UnknownTypeError
from functrain.tree import Tree
from functrain.tree.nodes import is_registered

T = TypeVar("T")
_REGISTERED: dict[str, type] = {}


@overload
def register(cls: type[T]) -> type[T]: ...


@overload
def register(*, name: str) -> Callable[[type[T]], type[T]]: ...


def register(cls: type[T] | None = None, *, name: str | None = None) -> Any:
    """Let `load` without `like=` build this NamedTuple or tree dataclass again; returns it, so it decorates too.

    In files the type has this `name`, or its module and qualified name; with a name of its own it can move.
    functrain's own types need no registration. `load` puts a dataclass together without `__init__`, as trees do.
    Raises: TypeError for another kind of type; ValueError for a name that stands for another type.

    >>> from tempfile import TemporaryDirectory
    >>> from typing import NamedTuple
    >>> @ft.checkpoint.register(name="mine.Moments")
    ... class Moments(NamedTuple):
    ...     mean: torch.Tensor
    >>> with TemporaryDirectory() as folder:
    ...     ft.checkpoint.load(ft.checkpoint.save(f"{folder}/mine", Moments(torch.zeros(2))))
    Moments(mean=tensor([0., 0.]))
    """
    if cls is None:
        return functools.partial(register, name=name)
    if not _is_node(cls):
        raise TypeError(
            f"register: expected a NamedTuple or dataclass that is a tree node, came {cls!r}; "
            "use functrain.tree.dataclass"
        )
    if name is not None:
        before = _REGISTERED.get(name, cls)
        if before is not cls and type_name(before) == name and _qualified(before) != _qualified(cls):
            raise ValueError(f"register: {name!r} stands for {before!r}, came {cls!r}; choose another name")
        REGISTERED_NAMES[cls] = name
    _REGISTERED[type_name(cls)] = cls
    return cls


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def build(node: Node, leaf: Callable[[Node], Any], where: str, path: str = "") -> Tree:
    """Return the tree of this description with `leaf(node)` for each leaf; the inverse of `describe`.

    Raises: UnknownTypeError naming `where` and the path of a type that is not registered.
    """
    kind = node["kind"]
    if "items" not in node:
        return None if kind == "none" else leaf(node)
    made = [build(child, leaf, where, f"{path}/{name}" if path else name) for name, child in named_items(node)]
    if kind in ("list", "tuple"):
        return made if kind == "list" else tuple(made)
    keys = [name for name, _ in node["items"]]
    if kind == "dict":
        return dict(zip(keys, made, strict=True))
    if kind == "ordered_dict":
        return OrderedDict(zip(keys, made, strict=True))
    if kind == "defaultdict":
        if node["factory"] == "other":
            raise _unknown(where, path, "a default_factory of its own")
        factory = None if node["factory"] is None else FACTORIES[node["factory"]]
        return defaultdict(factory, zip(keys, made, strict=True))
    cls = _find(node["type"])
    static = dict(node.get("static", []))
    if cls is None or is_namedtuple(cls) != (kind == "namedtuple"):
        raise _unknown(where, path, f"{kind} {node['type']} with fields {[*keys, *static]}")
    if not _fit(cls, {*keys, *static}):
        expected, came = f"{node['type']} with fields {_fields(cls)}, as it is here", f"{[*keys, *static]}"
        way_out = "pass like=, with only= for the fields that were saved and rename= for those that have another name"
        raise UnknownTypeError(where, path=path, expected=expected, came=came, way_out=way_out)
    if any(value["kind"] == "other" for value in static.values()):
        raise _unknown(where, path, f"static fields of {node['type']} that JSON cannot keep")
    fixed = {name: None if value["kind"] == "none" else scalar(value) for name, value in static.items()}
    values = {**_defaults(cls), **dict(zip(keys, made, strict=True)), **fixed}
    if kind == "namedtuple":
        return cls(**values)
    # without __init__ and __post_init__, which are code that a file must not start, and may refuse what a tree holds
    new: Any = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(new, name, value)  # the class may be frozen
    return new


def _is_node(cls: type) -> bool:
    return is_namedtuple(cls) or (dataclasses.is_dataclass(cls) and is_registered(cls))


def _fit(cls: type, saved: set[str]) -> bool:
    """Tell whether these are the fields of a type, but for those with a default: it may have grown since it saved."""
    fields = set(_fields(cls))
    return fields - set(_defaults(cls)) <= saved <= fields


def _fields(cls: type) -> list[str]:
    return list(cls._fields) if is_namedtuple(cls) else [f.name for f in dataclasses.fields(cls)]  # type: ignore


def _defaults(cls: type) -> dict[str, Any]:
    if is_namedtuple(cls):
        return dict(cls._field_defaults)  # type: ignore[attr-defined]
    missing, fields = dataclasses.MISSING, dataclasses.fields(cls)
    made = {f.name: f.default_factory() for f in fields if f.default_factory is not missing}
    return {**made, **{f.name: f.default for f in fields if f.default is not missing}}


def _find(name: str) -> type | None:
    """A registered type, or a node type that functrain itself defines."""
    module, _, attribute = name.rpartition(".")
    if name not in _REGISTERED and _ours(module):
        _load_house()
    if name not in _REGISTERED and _ours(module) and module in sys.modules:
        cls = vars(sys.modules[module]).get(attribute)  # getattr would run a module's __getattr__, which may import
        if isinstance(cls, type) and type_name(cls) == name and _is_node(cls):
            return cls
    return _REGISTERED.get(name) or _moved(name)


@functools.cache
def _load_house() -> None:
    # every room, whatever the file names: one that nobody has named yet in this process is not loaded
    house = sys.modules["functrain"]
    for room in house.ROOMS:
        if room != "testing":  # has no such types, and needs hypothesis
            getattr(house, room)


def _moved(name: str) -> type | None:
    """A node type of functrain's that had this name when it lay in another file, where one type alone can be meant."""
    module, _, attribute = name.rpartition(".")
    if not _ours(module) or module in sys.modules:
        return None
    found = [vars(other).get(attribute) for other in _our_modules()]
    types = {cls for cls in found if isinstance(cls, type) and _ours(cls.__module__) and _is_node(cls)}
    return types.pop() if len(types) == 1 else None


def _our_modules() -> list[ModuleType]:
    return [module for name, module in list(sys.modules.items()) if _ours(name) and isinstance(module, ModuleType)]


def _ours(module: str) -> bool:
    return module.split(".")[0] == "functrain"


def _unknown(where: str, path: str, came: str) -> UnknownTypeError:
    way_out = "pass like= a tree of the same structure, or register the type with functrain.checkpoint.register"
    return UnknownTypeError(where, path=path, expected="types registered here", came=came, way_out=way_out)
