"""`functrain inspect`: the table of what a run, a checkpoint or a safetensors file holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from functrain import checkpoint, tree
from functrain.checkpoint.description import scalar
from functrain.cli.options import UsageError, parse


@dataclass(frozen=True, kw_only=True)
class Options:
    what: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN|CHECKPOINT|FILE")]
    """A run's folder (its newest checkpoint), a checkpoint's folder, or a safetensors file."""


def main(words: Sequence[str]) -> None:
    options = parse(Options, words, prog="functrain inspect", description=__doc__ or "")
    path = Path(options.what)
    if path.is_file():
        print(tree.format(nested(checkpoint.load_file(path), str(path))))
        return
    if not path.is_dir():
        raise UsageError(f"{path}: no such file or folder")
    folder = path if (path / "tree.json").exists() else checkpoint.latest(path)
    if folder is None:
        raise UsageError(f"{path}: expected a run or a checkpoint, and there is none in it")
    said = checkpoint.contents(folder)
    print(folder)
    for name, value in {**said.metadata, **said.environment}.items():
        print(f"{name}: {value}")
    leaves = {path: _leaf(node) for path, node in said.leaves.items()}
    print(tree.format(nested(leaves, str(folder)), trainable="params/**"))


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
