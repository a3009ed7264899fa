"""What `functrain verify` does."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from functrain import checkpoint
from functrain.checkpoint import hub, manifest
from functrain.checkpoint.tensors import scan
from functrain.cli import bars
from functrain.cli.options import UsageError
from functrain.progress import Progress, counter


def verify(path: Path) -> bool:
    """Say of each part whether it is whole, and tell whether all are."""
    broken = 0
    for part, check in _parts(path):
        try:
            with bars.bar(f"verifying {part.name}", "bytes") as verifying:
                said = check(verifying)
            print(f"{part}: {said}", flush=True)
        except checkpoint.CheckpointError as error:
            print(f"functrain: {error}", file=sys.stderr)
            broken += 1
    return not broken


def _parts(path: Path) -> list[tuple[Path, Callable[[Progress], str]]]:
    """Return what is there to be read, each with the function that reads it: it returns a line, or raises."""
    if path.is_file():
        return [(path, functools.partial(_plain, lambda: [path], lambda take: scan(path, take, links=True)))]
    if not path.is_dir():
        raise UsageError(f"{path}: no such file or folder")
    if (path / manifest.NAME).exists() or (path / manifest.TREE).exists():
        return [(path, functools.partial(_checkpoint, path))]
    if (path / hub.SINGLE).exists() or (path / hub.INDEX).exists():
        files = functools.partial(hub.files, path)
        return [(path, functools.partial(_plain, files, functools.partial(hub.scan_folder, path)))]
    steps = checkpoint.list(path)
    if not steps:
        raise UsageError(f"{path}: expected a run, a checkpoint or a model's safetensors, and there is none in it")
    return [(step, functools.partial(_checkpoint, step)) for step in steps]


def _checkpoint(folder: Path, progress: Progress) -> str:
    found = checkpoint.verify(folder, progress=progress)
    return f"whole, {len(found.leaves):,} leaves, {found.size_bytes:,} bytes, each file has its sha256"


def _plain(
    files: Callable[[], list[Path]], read: Callable[[Callable[[str, Tensor], None]], object], progress: Progress
) -> str:
    add, sizes = counter(sum(file.stat().st_size for file in files()), progress), list[int]()

    def take(name: str, tensor: Tensor) -> None:
        sizes.append(tensor.nbytes)
        add(tensor.nbytes)

    read(take)
    return f"well formed, {len(sizes):,} tensors, {sum(sizes):,} bytes; no checksum says whether their values are right"
