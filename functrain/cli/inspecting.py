"""What `functrain inspect` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from functrain import checkpoint, tree
from functrain.checkpoint import hub, manifest
from functrain.checkpoint.description import scalar
from functrain.checkpoint.tensors import DTYPES, scan
from functrain.cli.options import UsageError


def inspect(what: Path, *, depth: int | None, with_leaves: bool) -> None:
    """Show the summary of a file or folder, and a line for every tensor `with_leaves`."""
    said, leaves = _found(what)
    where, trainable = str(what), "params/**" if any(path.startswith("params/") for path in leaves) else "**"
    # the names of modules have dots between their parts, where a tree has slashes
    dotted = not any("/" in path for path in leaves)
    parts = nested({path.replace(".", "/"): leaf for path, leaf in leaves.items()} if dotted else leaves, where)
    summed = tree.summary(parts, depth=depth or (3 if trainable != "**" else 2), trainable=trainable)
    for line in said:
        print(line)
    print(summed)
    if with_leaves:
        print(f"\n{tree.format(nested(leaves, where), trainable=trainable)}")


def _found(path: Path) -> tuple[list[str], dict[str, Any]]:
    """Return what is to be said of a file or folder, and its leaves by path, the tensors without their memory."""
    if path.is_file():
        return [str(path)], _headers([path])
    if not path.is_dir():
        raise UsageError(f"{path}: no such file or folder")
    if not (path / manifest.TREE).exists() and ((path / hub.SINGLE).exists() or (path / hub.INDEX).exists()):
        return [str(path)], _headers(hub.files(path))
    folder = path if (path / manifest.TREE).exists() else checkpoint.latest(path)
    if folder is None:
        raise UsageError(f"{path}: expected a run, a checkpoint or a model's safetensors, and there is none in it")
    said = checkpoint.contents(folder)
    about = [f"{name}: {value}" for name, value in {**said.metadata, **said.environment}.items()]
    return [str(folder), *about], {path: _leaf(node) for path, node in said.leaves.items()}


def _headers(files: Sequence[Path]) -> dict[str, Any]:
    entries = [entry for file in files for entry in scan(file, lambda name, tensor: None, wanted=_none, links=True)]
    return {entry.name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta") for entry in entries}


def _none(name: str) -> bool:
    return False


def nested(leaves: Mapping[str, Any], where: str) -> Any:
    """Build the tree whose leaves have these paths.

    Raises: UsageError for a path that goes on below another leaf.
    """
    top: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *above, last = path.split("/")
        place: Any = top
        for part in above:
            place = place.setdefault(part, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict) or last in place:
            raise UsageError(f"{where}: {path!r} lies below another tensor's name, which no tree can hold")
        place[last] = leaf
    return _numbered(top)


def _numbered(node: Any) -> Any:
    """Make indices of keys that are all numbers, so that 2 precedes 10."""
    if not isinstance(node, dict):
        return node
    index = all(key.isdecimal() for key in node)
    return {int(key) if index else key: _numbered(child) for key, child in node.items()}


def _leaf(node: dict[str, Any]) -> Any:
    if node["kind"] != "tensor":
        return scalar(node)
    # a tensor without memory: the table needs no values, and a checkpoint may be larger than this machine
    return torch.empty(node["shape"], dtype=getattr(torch, node["dtype"]), device="meta")
