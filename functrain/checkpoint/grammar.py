"""What a tree description may look like; whatever else a file holds is refused before anything is built from it."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from typing import Any

from functrain.checkpoint.description import FACTORIES, MAX_LEVELS, Node, is_dense
from functrain.checkpoint.errors import IntegrityError
from functrain.checkpoint.parts import is_split_well
from functrain.checkpoint.strict_json import is_text
from functrain.checkpoint.tensors import DTYPE_NAMES


def check(node: Any, where: str, path: str = "", level: int = 0) -> Node:
    """Return the node when it and all below it are well formed.

    Raises: IntegrityError naming `where` and the path.
    """
    kind = node.get("kind") if isinstance(node, dict) else None
    # "other" stands for what JSON cannot keep of a static field; it is no tree node
    form = _FORMS.get(kind) if isinstance(kind, str) and kind != "other" else None
    if level > MAX_LEVELS or form is None or not form(node):
        came = reprlib.repr(node) if level <= MAX_LEVELS else f"more than {MAX_LEVELS} levels"
        way_out = "use an older checkpoint or a copy of this one"
        raise IntegrityError(where, path=path, expected="a well-formed tree node", came=came, way_out=way_out)
    for i, item in enumerate(node.get("items", [])):
        name, child = (str(i), item) if kind in ("list", "tuple") else item
        check(child, where, f"{path}/{name}" if path else str(name), level + 1)
    return node


def _has(node: Node, *names: str) -> bool:
    return set(node) == {"kind", *names}


def _pairs(rows: Any, *, fields: bool) -> bool:
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == 2 for row in rows):
        return False
    keys = [row[0] for row in rows]
    if not all(type(key) is str or (type(key) is int and not fields) for key in keys):
        return False
    names = [str(key) for key in keys]
    return len(set(names)) == len(names) and all(name and "/" not in name and is_text(name) for name in names)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _is_hex(value: Any, digits: int) -> bool:
    return isinstance(value, str) and len(value) == digits and set(value) <= set("0123456789abcdef")


def _tensor(node: Node) -> bool:
    if not {"kind", "tensor", "dtype", "shape"} <= set(node) <= {"kind", "tensor", "dtype", "shape", "stride", "split"}:
        return False
    plain = type(node["tensor"]) is str and type(node["dtype"]) is str and node["dtype"] in DTYPE_NAMES
    if not plain or not _is_sizes(node["shape"]):
        return False
    if "stride" in node and not (_is_sizes(node["stride"]) and is_dense(node["shape"], node["stride"])):
        return False
    return "split" not in node or is_split_well(node["shape"], node["split"])


def _float(node: Node) -> bool:
    return (_has(node, "value") and type(node["value"]) is float) or (_has(node, "bits") and _is_hex(node["bits"], 16))


def _dataclass(node: Node) -> bool:
    if not _has(node, "type", "items", "static") or type(node["type"]) is not str:
        return False
    return _pairs(node["items"], fields=True) and _static(node["static"])


def _static(rows: Any) -> bool:
    if not _pairs(rows, fields=True):
        return False
    scalars = ("none", "bool", "int", "float", "complex", "str", "other")
    return all(isinstance(n, dict) and n.get("kind") in scalars and _FORMS[n["kind"]](n) for _, n in rows)


def _sequence(node: Node) -> bool:
    return _has(node, "items") and isinstance(node["items"], list)


def _mapping(node: Node) -> bool:
    return _has(node, "items") and _pairs(node["items"], fields=False)


def _defaultdict(node: Node) -> bool:
    factories: Sequence[Any] = [None, "other", *FACTORIES]
    return _has(node, "items", "factory") and node["factory"] in factories and _pairs(node["items"], fields=False)


def _namedtuple(node: Node) -> bool:
    return _has(node, "type", "items") and type(node["type"]) is str and _pairs(node["items"], fields=True)


_FORMS: dict[str, Callable[[Node], bool]] = {
    "none": lambda node: _has(node),
    "other": lambda node: _has(node),
    "bool": lambda node: _has(node, "value") and type(node["value"]) is bool,
    "int": lambda node: _has(node, "value") and type(node["value"]) is int,
    "str": lambda node: _has(node, "value") and type(node["value"]) is str and is_text(node["value"]),
    "float": _float,
    "complex": lambda node: _has(node, "bits") and _is_hex(node["bits"], 32),
    "tensor": _tensor,
    "list": _sequence,
    "tuple": _sequence,
    "dict": _mapping,
    "ordered_dict": _mapping,
    "defaultdict": _defaultdict,
    "namedtuple": _namedtuple,
    "dataclass": _dataclass,
}
