"""A tree into a folder: safetensors files, a JSON description, a manifest. Never a pickle."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from functrain.checkpoint import document, manifest, staging
from functrain.checkpoint.collect import collect
from functrain.checkpoint.errors import ExistsError, MissingError, StorageError
from functrain.checkpoint.reading import verify
from functrain.checkpoint.stream import Record, Sink
from functrain.checkpoint.tensors import write_file
from functrain.tree import Tree

Folder = str | os.PathLike[str]
Part = dict[str, Tensor] | bytes  # what one file holds: tensors by name, or text
_MAX_FILE_BYTES = 4 << 30  # a new safetensors file begins where one would grow longer


def save(folder: Folder, tree: Tree, *, metadata: Mapping[str, Any] | None = None) -> Path:
    """Save a tree of tensors and plain scalars as `folder`, which appears whole or not at all; return its path.

    Equals the tree again under `load`: every bit, every container, tied leaves tied. Saving what the folder already
    holds changes nothing; a folder that holds something else is never overwritten.
    Raises: UnsupportedError naming a leaf, before anything is written; ExistsError; StorageError.
    """
    target = Path(folder).absolute()
    node, tensors = collect(tree, str(folder))
    text = document.write(node, metadata or {}, str(folder))
    files: dict[str, Part] = {**_parts(tensors), manifest.TREE: text}
    if os.path.lexists(target) and not _is_empty_folder(target):
        _check_same(target, files)
        return Path(folder)
    _check_room(target, sum(tensor.nbytes for tensor in tensors.values()) + len(text))
    with staging.staged(target) as stage:
        records = {name: _write(stage / name, part) for name, part in files.items()}
        _write(stage / manifest.NAME, manifest.write(records))
    return Path(folder)


def _parts(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Divide tensors into files of at most _MAX_FILE_BYTES, unless one tensor alone is longer."""
    groups: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if groups[-1] and filled + tensor.nbytes > _MAX_FILE_BYTES:
            groups.append({})
            filled = 0
        groups[-1][name] = tensor
        filled += tensor.nbytes
    if len(groups) == 1:
        return {"tensors.safetensors": groups[0]}
    return {f"tensors-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _write(path: Path | None, part: Part) -> Record:
    if isinstance(part, dict):
        return write_file(path, part)
    sink = Sink(path)
    try:
        sink.write(memoryview(part))
        return sink.finish()
    finally:
        sink.close()


def _is_empty_folder(target: Path) -> bool:
    return target.is_dir() and not target.is_symlink() and not any(target.iterdir())


def _check_same(target: Path, files: Mapping[str, Part]) -> None:
    way_out = "choose another name, or remove it first"
    try:
        there = manifest.read(target)
    except MissingError as error:
        raise ExistsError(target, expected="no such folder yet", came=error.came, way_out=way_out) from None
    if there != {name: _write(None, part) for name, part in files.items()}:
        came = "another tree, metadata or environment"
        raise ExistsError(target, expected="no folder, or one with this tree", came=came, way_out=way_out)
    verify(target)


def _check_room(target: Path, need: int) -> None:
    disk = shutil.disk_usage(next(parent for parent in target.parents if parent.is_dir()))
    if need > disk.free:
        way_out = "make room, or save elsewhere"
        raise StorageError(target, expected=f"room for {need} bytes", came=f"{disk.free} bytes free", way_out=way_out)
