"""A tree as JSON: containers with their types, scalars as they are, tensors by the name they have in the files.

One node is a dict with a "kind"; docs/checkpoint-format.md lists them. A node never holds code or the name of code to
import: a NamedTuple or dataclass comes back only as a type that this process registered, or that `like=` holds.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from functrain import tree as trees
from functrain.checkpoint.errors import UnsupportedError
from functrain.checkpoint.strict_json import is_text
from functrain.tree import Tree

Node = dict[str, Any]
FACTORIES = {"list": list, "dict": dict, "int": int, "float": float, "str": str, "set": set, "tuple": tuple}
MAX_LEVELS = 100  # far below what overflows the stack of any reader
MAX_INT_BITS = 10_000  # Python itself refuses to read a number of more than 4300 digits


def describe(tree: Tree, tensor_node: Callable[[str, Tensor], Node], where: str) -> Node:
    """Return the tree's description, in which `tensor_node(path, tensor)` stands for each tensor.

    Raises: UnsupportedError naming `where` and the path of a leaf or key that JSON cannot keep.
    """

    def visit(node: Tree, path: str, level: int = 0) -> Node:
        if level > MAX_LEVELS:
            came = "more, or a tree inside itself"
            raise unsupported(where, path[:40], f"at most {MAX_LEVELS} levels", came, "flatten the tree")
        try:
            below = trees.children(node)
        except (TypeError, ValueError) as error:
            raise unsupported(where, path, "dictionary keys that make paths", str(error), "rename the key") from error
        if below is None:
            return tensor_node(path, node) if isinstance(node, Tensor) else _scalar(node, path, where)
        if not _is_known(node):
            came, way_out = type_name(type(node)), "make it a list, tuple, dict, NamedTuple or tree.dataclass"
            raise unsupported(where, path, "a container that a file can name", came, way_out)
        rows = [(name, visit(child, f"{path}/{name}" if path else name, level + 1)) for name, child in below]
        return _container(node, rows)

    return visit(tree, "")


def _is_known(node: Tree) -> bool:
    plain = (type(None), dict, OrderedDict, defaultdict, list, tuple)
    return type(node) in plain or is_namedtuple(type(node)) or dataclasses.is_dataclass(node)


def _container(node: Tree, rows: list[tuple[str, Node]]) -> Node:
    if node is None:
        return {"kind": "none"}
    if isinstance(node, dict):
        by_name = dict(rows)
        items = [[key, by_name[str(key)]] for key in node]  # the dictionary's own order and key types
        if type(node) is defaultdict:
            factory = next((name for name, made in FACTORIES.items() if made is node.default_factory), None)
            known = factory is not None or node.default_factory is None
            return {"kind": "defaultdict", "factory": factory if known else "other", "items": items}
        return {"kind": "ordered_dict" if isinstance(node, OrderedDict) else "dict", "items": items}
    if is_namedtuple(type(node)):
        return {"kind": "namedtuple", "type": type_name(type(node)), "items": [list(row) for row in rows]}
    if isinstance(node, (list, tuple)):
        return {"kind": "list" if isinstance(node, list) else "tuple", "items": [child for _, child in rows]}
    fixed = [f.name for f in dataclasses.fields(node) if f.name not in dict(rows)]
    static = [[name, _static(getattr(node, name))] for name in fixed]
    return {"kind": "dataclass", "type": type_name(type(node)), "items": [list(row) for row in rows], "static": static}


def is_namedtuple(cls: type) -> bool:
    return isinstance(cls, type) and issubclass(cls, tuple) and hasattr(cls, "_fields")


REGISTERED_NAMES: dict[type, str] = {}  # what `register` was told to call a type in files


def type_name(cls: type) -> str:
    return REGISTERED_NAMES.get(cls, f"{cls.__module__}.{cls.__qualname__}")


def _scalar(value: Any, path: str, where: str) -> Node:
    kind = type(value).__name__
    if type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        if kind == "str" and not is_text(value):
            raise unsupported(where, path, "text in Unicode", f"a lone surrogate in {value!a:.60}", "drop it")
        if kind == "int" and value.bit_length() > MAX_INT_BITS:
            raise unsupported(where, path, f"an int of {MAX_INT_BITS} bits", "a longer one", "save it as a str")
        return {"kind": kind, "value": value}
    if type(value) is float:
        return {"kind": "float", "bits": struct.pack(">d", value).hex()}  # inf and every NaN, which JSON lacks
    if type(value) is complex:
        return {"kind": "complex", "bits": struct.pack(">dd", value.real, value.imag).hex()}
    kept = "a tensor, bool, int, float, complex or str"
    raise unsupported(where, path, kept, f"{type(value).__module__}.{kind}", "make it one of those, or leave it out")


def _static(value: Any) -> Node:
    try:
        return {"kind": "none"} if value is None else _scalar(value, "", "")
    except UnsupportedError:
        return {"kind": "other"}  # a function, say: part of the type's meaning, and only `like=` can bring it back


def scalar(node: Node) -> Any:
    """Return the value of a scalar node."""
    if "bits" in node:
        parts = struct.unpack(">d" if node["kind"] == "float" else ">dd", bytes.fromhex(node["bits"]))
        return parts[0] if node["kind"] == "float" else complex(*parts)
    return node["value"]


def leaves(node: Node, path: str = "") -> dict[str, Node]:
    """Return the tensor and scalar nodes below, by path."""
    if "items" not in node:
        return {} if node["kind"] == "none" else {path: node}
    found: dict[str, Node] = {}
    for name, child in named_items(node):
        found |= leaves(child, f"{path}/{name}" if path else str(name))
    return found


def named_items(node: Node) -> list[tuple[str, Node]]:
    """Return a container's (name, child) pairs; list and tuple name their children 0, 1, ..."""
    if node["kind"] in ("list", "tuple"):
        return [(str(i), child) for i, child in enumerate(node["items"])]
    return [(str(name), child) for name, child in node["items"]]


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Tell whether the elements fill one block of memory, each once, in any order of dimensions."""
    if len(shape) != len(stride):
        return False
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True


def unsupported(where: str, path: str, expected: str, came: str, way_out: str) -> UnsupportedError:
    return UnsupportedError(where, path=path, expected=expected, came=came, way_out=way_out)
