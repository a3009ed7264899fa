"""Compare a saved tree with `like=`: all differences at once, grouped, by path."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from functrain.checkpoint.collect import shape_and_dtype
from functrain.checkpoint.description import Node, describe, named_items, scalar, type_name, unsupported
from functrain.checkpoint.errors import MismatchError
from functrain.checkpoint.tensors import DTYPE_NAMES
from functrain.sharding.pieces import cut_of, is_split
from functrain.tree import Tree

Types = dict[tuple[str, str | None], Any]  # by path, or by path and static field
_SHOWN = 8  # of each group


def describe_like(like: Tree) -> Node:
    """Return the description of `like=`; its tensors have no names in a file.

    Raises: UnsupportedError naming the path of a leaf that no checkpoint holds, or that is split in parts of unequal
    shapes.
    """

    def node(path: str, tensor: Tensor) -> Node:
        if is_split(tensor):
            try:
                cut_of(tensor)
            except ValueError as error:
                raise unsupported("like=", path, "what a plan splits", str(error), "split it by plan.shard") from error
        elif tensor.layout != torch.strided or tensor.is_nested or type(tensor) not in (Tensor, torch.nn.Parameter):
            way_out = "pass a plain tensor, on the meta device if it has no values"
            came = f"{type_name(type(tensor))} of layout {tensor.layout}"
            raise unsupported("like=", path, "a plain tensor, which is what load gives", came, way_out)
        return {"kind": "tensor", **shape_and_dtype(tensor)}

    return describe(like, node, "like=")


def check(
    want: Mapping[str, Node],
    want_types: Types,
    have: Mapping[str, Node],
    have_types: Types,
    where: str,
    at: str,
    *,
    cast: bool,
) -> None:
    """Return when `like` has the paths, shapes, dtypes and scalar types of the saved tree.

    Containers may differ in kind (a dict for a NamedTuple), but not in the name of their NamedTuple or dataclass nor
    in its static fields: the same paths under another optimizer state mean something else. With `cast`, floating
    dtypes may differ.
    Raises: MismatchError, whose paths are those below `at`, with it.
    """

    def full(path: str) -> str:
        return f"{at}/{path}" if at and path else at or path

    def differing(title: str) -> list[str]:
        both = [(path, _FACTS[title](want[path]), _FACTS[title](have[path])) for path in want if path in have]
        # None on one side is a difference that another group tells
        rows = [(path, a, b) for path, a, b in both if a != b and None not in (a, b)]
        if title == "dtype" and cast:
            rows = [(path, a, b) for path, a, b in rows if not (_is_floating(a) and _is_floating(b))]
        return [f"{full(path)}: like= has {a}, the checkpoint {b}" for path, a, b in rows]

    missing = [full(path) for path in sorted(want.keys() - have.keys())]
    extra = [full(path) for path in sorted(have.keys() - want.keys())]
    groups = {
        "only in like=": [_hinted(path, extra) for path in missing[:_SHOWN]] + missing[_SHOWN:],
        "only in the checkpoint": [_hinted(path, missing) for path in extra[:_SHOWN]] + extra[_SHOWN:],
        **{title: differing(title) for title in _FACTS},
        "type": [
            f"{full(path)}{f'.{field}' if field else ''}: like= has {kind}, the checkpoint {have_types[path, field]}"
            for (path, field), kind in want_types.items()
            if None not in (kind, have_types.get((path, field))) and kind != have_types[path, field]
        ],
    }
    count = sum(len(rows) for rows in groups.values())
    if count:
        way_out = "pass like= a tree as it was saved, or use only=, rename= or cast="
        raise MismatchError(
            where,
            expected="the tree of like=",
            came=f"{count} difference{'s' * (count > 1)}",
            way_out=f"{way_out}, which casts floating to floating" if cast else way_out,
            details="\n".join(_lines(title, rows) for title, rows in groups.items() if rows),
        )


_FACTS = {
    "kind": lambda node: node["kind"],
    "shape": lambda node: tuple(node["shape"]) if "shape" in node else None,
    "dtype": lambda node: node.get("dtype"),
}


def _is_floating(dtype: str) -> bool:
    return DTYPE_NAMES[dtype].is_floating_point


def types(node: Node, path: str = "") -> Types:
    """Return named types and their static fields. A type may move to another module; its own name stays."""
    found: Types = {}
    if "type" in node:
        found[path, None] = node["type"].rpartition(".")[2]
    for name, value in node.get("static", []):
        known = value["kind"] not in ("none", "other")
        found[path, name] = repr(scalar(value)) if known else {"none": "None"}.get(value["kind"])
    for name, child in named_items(node) if "items" in node else []:
        found |= types(child, f"{path}/{name}" if path else name)
    return found


def _hinted(path: str, others: list[str]) -> str:
    near = difflib.get_close_matches(path, others[:1000], n=1, cutoff=0.75)
    return f"{path} (did you mean {near[0]}?)" if near else path


def _lines(title: str, rows: list[str]) -> str:
    more = [f"and {len(rows) - _SHOWN} more"] if len(rows) > _SHOWN else []
    return "\n".join([f"  {title} ({len(rows)}):", *(f"    {row}" for row in rows[:_SHOWN] + more)])
