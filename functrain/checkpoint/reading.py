"""A folder back to a tree, after every byte was compared with the manifest."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain import tree as trees
from functrain.checkpoint import document, manifest
from functrain.checkpoint.description import Node, leaves, named_items, scalar
from functrain.checkpoint.errors import MissingError
from functrain.checkpoint.header import Entry
from functrain.checkpoint.like import check_like
from functrain.checkpoint.registry import build
from functrain.checkpoint.stream import Record, changed
from functrain.checkpoint.tensors import DTYPE_NAMES, DTYPES, read_file
from functrain.tree import Tree

Folder = str | os.PathLike[str]
_log = logging.getLogger(__name__)


class Contents(NamedTuple):
    """What a checkpoint holds, without its tensors."""

    leaves: dict[str, Node]  # by path: {"kind": "tensor", "dtype": ..., "shape": ..., ...} or a scalar's node
    metadata: dict[str, Any]
    environment: dict[str, Any]
    size_bytes: int


def contents(folder: Folder) -> Contents:
    """Return what a checkpoint says about itself, without reading its tensors.

    Raises: MissingError, VersionError, IntegrityError.
    """
    return _contents(Path(folder))[0]


def _contents(folder: Path) -> tuple[Contents, Node, dict[str, Record]]:
    files = manifest.read(folder)
    said = document.read(folder / manifest.TREE, files[manifest.TREE])
    size_bytes = sum(record.size_bytes for record in files.values())
    return Contents(leaves(said.tree), said.metadata, said.environment, size_bytes), said.tree, files


def verify(folder: Folder) -> Contents:
    """Read every byte of a checkpoint and return what it holds when all is as it was saved.

    Raises: MissingError, VersionError, IntegrityError, HeaderError.
    """
    found, _, files = _contents(Path(folder))
    _read(Path(folder), files, found.leaves, keep=False)
    return found


def load(folder: Folder, *, like: Tree = None, at: str = "") -> Tree:
    """Load the tree that was saved, or the subtree `at` a path, after checking every byte against the manifest.

    With `like`, its containers, static fields and devices are those of the result, and its paths, shapes and dtypes
    must be those of the file; a `like` on the meta device gives tensors on the CPU. Without, containers are as saved,
    NamedTuples and dataclasses if their types are registered. Tensors own their memory and require no gradient.
    Raises: MissingError, VersionError, IntegrityError, HeaderError, MismatchError, UnknownTypeError.
    """
    path = Path(folder)
    _, node, files = _contents(path)
    node = _descend(node, at, str(folder))
    saved = leaves(node, at)
    if like is not None:
        check_like(node, like, str(folder), at)
    tensors = _read(path, files, saved, keep=True)

    def leaf(node: Node) -> Any:
        return tensors[node["tensor"]] if node["kind"] == "tensor" else scalar(node)

    if like is None:
        return build(node, leaf, str(folder), at)
    wanted, structure = trees.flatten(like)
    paths = [f"{at}/{path}" if at and path else at or path for path in trees.paths(like)]
    moved: dict[tuple[str, torch.device], Tensor] = {}  # a tied tensor moves once, so that it stays tied

    def placed(path: str, like_leaf: Any) -> Any:
        value = leaf(saved[path])
        if not isinstance(value, Tensor) or like_leaf.device.type == "meta":
            return value
        key = (saved[path]["tensor"], like_leaf.device)
        if key not in moved:
            moved[key] = value.to(like_leaf.device)
        return moved[key]

    return trees.unflatten(structure, [placed(path, old) for path, old in zip(paths, wanted, strict=True)])


def _descend(node: Node, at: str, where: str) -> Node:
    for name in at.split("/") if at else []:
        below = dict(named_items(node)) if "items" in node else {}
        if name not in below:
            came = f"only {', '.join(list(below)[:8])}" if below else "a leaf"
            raise MissingError(where, path=at, expected=f"{name!r}", came=came, way_out="name a path that was saved")
        node = below[name]
    return node


def _read(folder: Path, files: dict[str, Record], saved: dict[str, Node], *, keep: bool) -> dict[str, Tensor]:
    """Hash every file and return the tensors that `saved` names, or none of them unless `keep`."""
    nodes = {node["tensor"]: node for node in saved.values() if node["kind"] == "tensor"}
    entries: dict[str, Entry] = {}
    tensors: dict[str, Tensor] = {}
    for name in sorted(files.keys() - {manifest.TREE}):
        held, read = read_file(folder / name, wanted=lambda n: keep and n in nodes, record=files[name])
        for entry in held:
            if entry.name in entries:
                raise changed(folder / name, f"{entry.name!r} in one file", "a second one of this name")
            entries[entry.name] = entry
        tensors |= read
    for name, node in nodes.items():
        expected = (DTYPE_NAMES[node["dtype"]], tuple(node["shape"]))
        came = (DTYPES[entries[name].dtype], entries[name].shape) if name in entries else "none"
        if came != expected:
            raise changed(folder, f"the tensor {name!r} as {expected}", f"{came}")
    for path in set(folder.glob("*.safetensors")) - {folder / name for name in files}:
        _log.warning("%s: not in the manifest, ignored", path)
    return {name: _in_memory_order(tensor, nodes[name].get("stride")) for name, tensor in tensors.items()}


def _in_memory_order(tensor: Tensor, stride: list[int] | None) -> Tensor:
    if stride is None:
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)


def load_file(path: Folder) -> dict[str, Tensor]:
    """Load anybody's safetensors file, as a dict by name; tensors own their memory.

    Raises: HeaderError saying what the file is instead, IntegrityError, StorageError.
    """
    return read_file(Path(path), links=True)[1]
