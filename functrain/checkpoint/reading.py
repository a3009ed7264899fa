"""What a checkpoint says about itself, and its tensors, after every byte was compared with the manifest."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from functrain.checkpoint import document, index, manifest
from functrain.checkpoint.description import Node, leaves
from functrain.checkpoint.header import Entry
from functrain.checkpoint.stream import Record, changed
from functrain.checkpoint.tensors import DTYPE_NAMES, DTYPES, read_file, scan
from functrain.progress import Progress, counter

Folder = str | os.PathLike[str]
_log = logging.getLogger(__name__)


class Contents(NamedTuple):
    """What a checkpoint holds, without its tensors."""

    leaves: dict[str, Node]  # by path: {"kind": "tensor", "dtype": ..., "shape": ..., ...} or a scalar's node
    metadata: dict[str, Any]
    environment: dict[str, Any]
    size_bytes: int
    run: str | None  # the identity of the run whose `every` saved it


def contents(folder: Folder) -> Contents:
    """Return what a checkpoint says about itself, without reading its tensors.

    Raises: MissingError, VersionError, IntegrityError.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = ft.checkpoint.save(f"{folder}/mine", {"w": torch.zeros(2, 3)}, metadata={"epoch": 7})
    ...     found = ft.checkpoint.contents(path)
    >>> found.leaves["w"]["shape"], found.metadata
    ([2, 3], {'epoch': 7})
    """
    return opened(Path(folder))[0]


def opened(folder: Path) -> tuple[Contents, Node, dict[str, Record]]:
    """Return a checkpoint's contents, the root node of its tree, and the records of its files."""
    files = manifest.read(folder)
    said = document.read(folder / manifest.TREE, files[manifest.TREE])
    size_bytes = sum(record.size_bytes for record in files.values())
    return Contents(leaves(said.tree), said.metadata, said.environment, size_bytes, said.run), said.tree, files


def verify(folder: Folder, *, progress: Progress | None = None) -> Contents:
    """Read every byte of a checkpoint and return what it holds when all is as it was saved.

    `progress` counts bytes of its files.

    Raises: MissingError, VersionError, IntegrityError, HeaderError, StorageError.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     list(ft.checkpoint.verify(ft.checkpoint.save(f"{folder}/mine", {"w": torch.zeros(2, 3)})).leaves)
    ['w']
    """
    found, _, files = opened(Path(folder))
    add = counter(found.size_bytes, progress)
    sizes: list[int] = []

    def passed(size: int) -> None:
        sizes.append(size)
        add(size)

    read_tensors(Path(folder), files, found.leaves, None, passed=passed)
    add(found.size_bytes - sum(sizes))  # headers, and what says what the tensors are
    return found


def read_tensors(
    folder: Path,
    files: dict[str, Record],
    saved: dict[str, Node],
    take: Callable[[str, Tensor], None] | None,
    *,
    hashed: bool = True,
    passed: Callable[[int], object] | None = None,
) -> None:
    """Read every file, giving `take` the tensors that `saved` names, each as its node says or an error is raised.

    Without `take`, the bytes are only hashed; not `hashed`, only sizes, headers and names are compared.
    """
    nodes: dict[str, Node] = {}
    for path, node in saved.items():
        if node["kind"] == "tensor" and nodes.setdefault(node["tensor"], node) != node:
            raise changed(folder / manifest.TREE, f"one shape and dtype of {node['tensor']!r}", f"another at {path!r}")
    held: dict[str, Entry] = {}
    where: dict[str, str] = {}

    def take_as_described(name: str, tensor: Tensor) -> None:
        expected, came = _facts(nodes[name]), (tensor.dtype, tuple(tensor.shape))
        if came != expected:
            raise changed(folder, f"the tensor {name!r} as {expected}", f"{came}")
        if take is not None:
            take(name, tensor)

    for file in sorted(filter(manifest.is_tensors, files)):
        wanted = nodes.__contains__ if take is not None else _none
        record = files[file]
        for entry in scan(folder / file, take_as_described, wanted=wanted, record=record, hashed=hashed, passed=passed):
            if entry.name in held:
                raise changed(folder / file, f"{entry.name!r} in one file", "a second one of this name")
            held[entry.name], where[entry.name] = entry, file
    for name, node in nodes.items():
        came = (DTYPES[held[name].dtype], held[name].shape) if name in held else "none"
        if came != _facts(node):
            raise changed(folder, f"the tensor {name!r} as {_facts(node)}", f"{came}")
    if manifest.INDEX in files:
        index.check(folder / manifest.INDEX, files[manifest.INDEX], where)
    for other in set(folder.glob("*.safetensors")) - {folder / name for name in files}:
        _log.warning("%s: not in the manifest, ignored", other)


def _facts(node: Node) -> tuple[Any, tuple[int, ...]]:
    return DTYPE_NAMES[node["dtype"]], tuple(node["shape"])


def _none(name: str) -> bool:
    return False


def load_file(path: Folder) -> dict[str, Tensor]:
    """Load anybody's safetensors file, as a dict by name; tensors own their memory.

    Raises: HeaderError saying what the file is instead, IntegrityError, StorageError.

    >>> from safetensors.torch import save_file
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     save_file({"fc.weight": torch.ones(2)}, f"{folder}/model.safetensors")
    ...     ft.checkpoint.load_file(f"{folder}/model.safetensors")
    {'fc.weight': tensor([1., 1.])}
    """
    return read_file(Path(path), links=True)[1]
