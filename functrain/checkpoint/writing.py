"""A tree into a folder: safetensors files, a JSON description, a manifest. Never a pickle."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from functrain.checkpoint import document, index, manifest, staging, strict_json
from functrain.checkpoint.collect import collect
from functrain.checkpoint.crew import ALONE, Crew
from functrain.checkpoint.description import Node
from functrain.checkpoint.errors import ExistsError, MissingError
from functrain.checkpoint.reading import verify
from functrain.checkpoint.stream import Record, Sink
from functrain.checkpoint.tensors import divide, write_file
from functrain.sharding import Plan
from functrain.tree import Tree

Folder = str | os.PathLike[str]
Part = Mapping[str, Tensor] | bytes  # what one file holds: tensors by name, or text
MAX_FILE_BYTES = 4 << 30


class Draft(NamedTuple):
    """Everything that a checkpoint will hold of this rank, checked and not yet written."""

    files: dict[str, Part]
    node: Node  # the description of the tree, which stands in tree.json

    @property
    def size_bytes(self) -> int:
        return sum(map(_size, self.files.values()))


def save(
    folder: Folder,
    tree: Tree,
    *,
    metadata: Mapping[str, Any] | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    plan: Plan | None = None,
) -> Path:
    """Save a tree of tensors and plain scalars as `folder`, which appears whole or not at all; return its path.

    Equals the tree again under `load`: every bit, every container, tied leaves tied. Saving what the folder already
    holds changes nothing; a folder that holds something else is never overwritten. More than `max_file_bytes` of
    tensors become several files and an index; only a tensor that is longer alone makes a longer file.

    With `plan`, every rank must call it, with a folder that all of them see: each writes the parts that it has of split
    leaves, and the first one the rest; then it gives the folder its name.
    Raises: UnsupportedError naming a leaf, before anything is written; ExistsError; StorageError; what one rank raises,
    the others raise as a StorageError that names it.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = ft.checkpoint.save(f"{folder}/mine", {"w": torch.ones(2), "epoch": 7}, metadata={"lr": 0.1})
    ...     ft.checkpoint.load(path)
    {'w': tensor([1., 1.]), 'epoch': 7}
    """
    target, crew = Path(folder).absolute(), Crew(plan)
    drafted = crew.each(folder, lambda: draft(tree, str(folder), metadata or {}, None, max_file_bytes, crew))
    if crew.led(target, lambda: os.path.lexists(target) and not _is_empty_folder(target)):
        _check_same(target, drafted, crew)
    else:
        write(target, drafted, crew)
    return Path(folder)


def draft(
    tree: Tree, where: str, metadata: Mapping[str, Any], run: str | None, max_file_bytes: int, crew: Crew = ALONE
) -> Draft:
    """Take a tree apart for saving; each rank gets what it has to write.

    Raises: UnsupportedError naming `where` and a leaf.
    """
    check_max(max_file_bytes)
    node, tensors, parts = collect(tree, where, split=crew.count > 1)
    said: dict[str, Part] = {manifest.TREE: document.write(node, metadata, where, run)} if crew.leads else {}
    if crew.count > 1:
        groups = divide({**(tensors if crew.leads else {}), **parts}, max_file_bytes)
        return Draft({manifest.name_of(crew.rank, crew.count, i): x for i, x in enumerate(groups) if x} | said, node)
    groups = divide(tensors, max_file_bytes)
    if len(groups) == 1:
        return Draft({"tensors.safetensors": groups[0], **said}, node)
    files = {manifest.name_of(i, len(groups)): group for i, group in enumerate(groups)}
    return Draft({**files, manifest.INDEX: index.write(files), **said}, node)


def check_max(max_file_bytes: int) -> None:
    """Return when files may be so long. Raises: ValueError."""
    if type(max_file_bytes) is not int or max_file_bytes < 1:
        raise ValueError(f"max_file_bytes: expected at least 1 byte, came {max_file_bytes!r}")


def write(target: Path, drafted: Draft, crew: Crew = ALONE) -> None:
    """Write a draft as `target`, a folder that does not exist.

    Raises: ExistsError; StorageError.
    """
    sizes = crew.agreed(target, lambda: drafted.size_bytes)
    stages = contextlib.ExitStack()
    with stages:
        # the leader's context: it removes the folder where any rank fails
        stage = crew.led(target, lambda: stages.enter_context(staging.staged(target, sum(sizes))))

        def written() -> dict[str, Record]:
            try:
                return {name: _write(stage / name, part) for name, part in drafted.files.items()}
            except OSError as error:
                raise staging.told(error, target) from error

        found = crew.agreed(target, written)
        records = {name: record for each in found for name, record in each.items()}

        def named() -> None:
            _write(stage / manifest.NAME, manifest.write(records))
            stages.close()  # gives the folder its name

        crew.led(target, named)


def holds(folder: Path, drafted: Draft, crew: Crew = ALONE) -> bool:
    """Tell whether a checkpoint has this tree to the last bit, whatever its metadata and environment."""

    def mine() -> dict[str, Record]:
        return {name: _write(None, part) for name, part in drafted.files.items() if manifest.is_tensors(name)}

    here = {name: record for each in crew.agreed(folder, mine) for name, record in each.items()}

    def alike() -> bool:
        files = manifest.read(folder)
        there = {name: record for name, record in files.items() if manifest.is_tensors(name)}
        node = document.read(folder / manifest.TREE, files[manifest.TREE]).tree
        return there == here and strict_json.dumps(node) == strict_json.dumps(drafted.node)

    return crew.led(folder, alike)


def _size(part: Part) -> int:
    return len(part) if isinstance(part, bytes) else sum(tensor.nbytes for tensor in part.values())


def _write(path: Path | None, part: Part) -> Record:
    if not isinstance(part, bytes):
        return write_file(path, part)
    sink = Sink(path)
    try:
        sink.write(memoryview(part))
        return sink.finish()
    finally:
        sink.close()


def _is_empty_folder(target: Path) -> bool:
    return target.is_dir() and not target.is_symlink() and not any(target.iterdir())


def _check_same(target: Path, drafted: Draft, crew: Crew) -> None:
    found = crew.agreed(target, lambda: {name: _write(None, part) for name, part in drafted.files.items()})
    here = {name: record for each in found for name, record in each.items()}

    def check() -> None:
        way_out = "choose another name, or remove it first"
        try:
            there = manifest.read(target)
        except MissingError as error:
            raise ExistsError(target, expected="no such folder yet", came=error.came, way_out=way_out) from None
        if there != here:
            came = "another tree, metadata or environment"
            raise ExistsError(target, expected="no folder, or one with this tree", came=came, way_out=way_out)
        verify(target)
        try:
            staging.fsync_folder(target.parent)  # whoever saved it may have been killed before
        except OSError as error:
            raise staging.told(error, target) from error

    crew.led(target, check)
