"""Compare a saved tree with `like=`: all differences at once, grouped, by path."""

from __future__ import annotations

import difflib
from typing import Any

from functrain.checkpoint.collect import shape_and_dtype
from functrain.checkpoint.description import Node, describe, leaves, named_items, scalar
from functrain.checkpoint.errors import MismatchError
from functrain.tree import Tree

_SHOWN = 8  # of each group


def check_like(saved: Node, like: Tree, where: str, at: str = "") -> None:
    """Return when `like` has the paths, shapes, dtypes and scalar types of the saved tree.

    Containers may differ in kind (a dict for a NamedTuple), but not in the name of their NamedTuple or dataclass nor
    in its static fields: the same paths under another optimizer state mean something else.
    Raises: MismatchError.
    """
    wanted = describe(like, lambda path, tensor: {"kind": "tensor", **shape_and_dtype(tensor)}, "like=")
    want, have = leaves(wanted, at), leaves(saved, at)
    missing, extra = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
    groups = {
        "only in like=": [_hinted(path, extra) for path in missing[:_SHOWN]] + missing[_SHOWN:],
        "only in the checkpoint": [_hinted(path, missing) for path in extra[:_SHOWN]] + extra[_SHOWN:],
        **{title: _differing(want, have, fact) for title, fact in _FACTS.items()},
        "type": _differing(_types(wanted, at), _types(saved, at), lambda name: name),
    }
    count = sum(len(rows) for rows in groups.values())
    if count:
        raise MismatchError(
            where,
            expected="the tree of like=",
            came=f"{count} difference{'s' * (count > 1)}",
            way_out="pass like= a tree as it was saved",
            details="\n".join(_lines(title, rows) for title, rows in groups.items() if rows),
        )


_FACTS = {
    "kind": lambda node: node["kind"],
    "shape": lambda node: tuple(node["shape"]) if "shape" in node else None,
    "dtype": lambda node: node.get("dtype"),
}


def _differing(want: dict[str, Any], have: dict[str, Any], fact: Any) -> list[str]:
    both = [(path, fact(want[path]), fact(have[path])) for path in want if path in have]
    # None on one side is a difference that another group tells
    return [f"{p}: like= has {a}, the checkpoint {b}" for p, a, b in both if a != b and None not in (a, b)]


def _types(node: Node, path: str) -> dict[str, Any]:
    """Named types and their static fields, by path. A type may move to another module; its own name stays."""
    found: dict[str, Any] = {}
    if "type" in node:
        found[path] = node["type"].rpartition(".")[2]
    for name, value in node.get("static", []):
        known = value["kind"] not in ("none", "other")
        found[f"{path}.{name}"] = repr(scalar(value)) if known else {"none": "None"}.get(value["kind"])
    for name, child in named_items(node) if "items" in node else []:
        found |= _types(child, f"{path}/{name}" if path else name)
    return found


def _hinted(path: str, others: list[str]) -> str:
    near = difflib.get_close_matches(path, others[:1000], n=1, cutoff=0.75)
    return f"{path} (did you mean {near[0]}?)" if near else path


def _lines(title: str, rows: list[str]) -> str:
    more = [f"and {len(rows) - _SHOWN} more"] if len(rows) > _SHOWN else []
    return "\n".join([f"  {title} ({len(rows)}):", *(f"    {row}" for row in rows[:_SHOWN] + more)])
