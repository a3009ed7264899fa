"""What a checkpoint says about itself, and its tensors, after every byte was compared with the manifest."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from functrain.checkpoint import document, index, manifest, parts
from functrain.checkpoint.crew import Crew
from functrain.checkpoint.description import Node, leaves
from functrain.checkpoint.header import Entry
from functrain.checkpoint.stream import Record, Source, changed
from functrain.checkpoint.tensors import DTYPE_NAMES, DTYPES, Wanted, read_file, scan
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


def verify_share(folder: Path, crew: Crew) -> None:
    """Read every byte of a checkpoint, each rank those of some of its files.

    Raises: as `verify`, on all ranks, where any file is not as it was saved.
    """

    def mine() -> None:
        _, _, files = opened(folder)
        names = sorted(filter(manifest.is_tensors, files))
        for name in names[crew.rank :: crew.count]:
            with Source(folder / name, links=False, record=files[name]) as source:
                source.skip(source.size_bytes)
                source.finish()

    crew.each(folder, mine)


class Taking(Protocol):
    """What tensors are read for."""

    def wanted(self, piece: parts.Piece, /) -> Wanted: ...

    def take(self, piece: parts.Piece, tensor: Tensor, /) -> None: ...


def read_tensors(
    folder: Path,
    files: dict[str, Record],
    saved: dict[str, Node],
    taking: Taking | None,
    *,
    hashed: bool = True,
    passed: Callable[[int], object] | None = None,
) -> None:
    """Read every file, giving `taking` what it wants of the tensors that `saved` names, each as its node says or an
    error is raised.

    Without `taking`, the bytes are only hashed; not `hashed`, only sizes, headers and names are compared.
    """
    nodes: dict[str, Node] = {}
    for path, node in saved.items():
        if node["kind"] == "tensor" and nodes.setdefault(node["tensor"], node) != node:
            raise changed(folder / manifest.TREE, f"one shape and dtype of {node['tensor']!r}", f"another at {path!r}")
    size_bytes = sum(record.size_bytes for name, record in files.items() if manifest.is_tensors(name))
    if (count := parts.count(nodes)) > 2 + size_bytes // _LEAST_ROW_BYTES:
        raise changed(folder / manifest.TREE, f"tensors that {size_bytes} bytes may hold", f"{count}")
    pieces = dict(parts.pieces(nodes))
    held: dict[str, Entry] = {}
    where: dict[str, str] = {}

    def wanted(name: str) -> Wanted:
        return False if taking is None or name not in pieces else taking.wanted(pieces[name])

    def take(name: str, tensor: Tensor) -> None:
        assert taking is not None
        taking.take(pieces[name], tensor)

    def as_described(entry: Entry) -> None:
        if entry.name in pieces and (DTYPES[entry.dtype], entry.shape) != _facts(pieces[entry.name]):
            came = f"{(DTYPES[entry.dtype], entry.shape)}"
            raise changed(folder, f"the tensor {entry.name!r} as {_facts(pieces[entry.name])}", came)

    for file in sorted(filter(manifest.is_tensors, files)):
        how: dict[str, Any] = {"record": files[file], "hashed": hashed, "passed": passed, "check": as_described}
        for entry in scan(folder / file, take, wanted=wanted, **how):
            if entry.name in held:
                raise changed(folder / file, f"{entry.name!r} in one file", "a second one of this name")
            held[entry.name], where[entry.name] = entry, file
    for name, piece in pieces.items():
        if name not in held:
            raise changed(folder, f"the tensor {name!r} as {_facts(piece)}", "none")
    if manifest.INDEX in files:
        index.check(folder / manifest.INDEX, files[manifest.INDEX], where)
    for other in set(folder.glob("*.safetensors")) - {folder / name for name in files}:
        _log.warning("%s: not in the manifest, ignored", other)


def _facts(piece: parts.Piece) -> tuple[Any, tuple[int, ...]]:
    return DTYPE_NAMES[piece.node["dtype"]], piece.box.shape


_LEAST_ROW_BYTES = 48  # of a tensor in a header: its name, dtype, shape and offsets


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
