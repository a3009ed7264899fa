"""Descriptions back to trees, with the types that this process knows.

Nothing is imported for a file's sake: a NamedTuple or dataclass comes back only as a type that was registered here.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable
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

T = TypeVar("T")
_REGISTERED: dict[str, type] = {}


@overload
def register(cls: type[T]) -> type[T]: ...


@overload
def register(*, name: str) -> Callable[[type[T]], type[T]]: ...


def register(cls: type[T] | None = None, *, name: str | None = None) -> Any:
    """Let `load` without `like=` build this NamedTuple or tree dataclass again; returns it, so it decorates too.

    In files the type has this `name`, or its module and qualified name; with a name of its own it can move.
    functrain's own types need no registration.
    Raises: TypeError for another kind of type; ValueError for a name that stands for another type.
    """
    if cls is None:
        return functools.partial(register, name=name)
    if not (is_namedtuple(cls) or dataclasses.is_dataclass(cls)):
        raise TypeError(f"register: expected a NamedTuple or dataclass, came {cls!r}; other types cannot be tree nodes")
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
    if cls is None or is_namedtuple(cls) != (kind == "namedtuple") or not _fit(cls, {*keys, *static}):
        raise _unknown(where, path, f"{kind} {node['type']} with fields {[*keys, *static]}")
    if any(value["kind"] == "other" for value in static.values()):
        raise _unknown(where, path, f"static fields of {node['type']} that JSON cannot keep")
    fixed = {name: None if value["kind"] == "none" else scalar(value) for name, value in static.items()}
    return cls(**dict(zip(keys, made, strict=True)), **fixed)


def _fit(cls: type, saved: set[str]) -> bool:
    """Tell whether these are the fields of a type, but for those with a default: it may have grown since it saved."""
    if is_namedtuple(cls):
        fields, required = set(cls._fields), set(cls._fields) - set(cls._field_defaults)  # type: ignore[attr-defined]
    else:
        all_fields = dataclasses.fields(cls)
        fields = {f.name for f in all_fields}
        required = {f.name for f in all_fields if f.default is f.default_factory is dataclasses.MISSING}
    return required <= saved <= fields


def _find(name: str) -> type | None:
    """A registered type, or a node type that functrain itself has defined; nothing is imported for a file's sake."""
    module, _, attribute = name.rpartition(".")
    if name not in _REGISTERED and module.split(".")[0] == "functrain" and module in sys.modules:
        cls = getattr(sys.modules[module], attribute, None)
        if isinstance(cls, type) and type_name(cls) == name and (is_namedtuple(cls) or dataclasses.is_dataclass(cls)):
            return cls
    return _REGISTERED.get(name)


def _unknown(where: str, path: str, came: str) -> UnknownTypeError:
    way_out = "pass like= a tree of the same structure, or register the type with functrain.checkpoint.register"
    return UnknownTypeError(where, path=path, expected="types registered here", came=came, way_out=way_out)
