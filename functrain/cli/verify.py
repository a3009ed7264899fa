"""`functrain verify`: read every byte of a run's checkpoints, of a model's folder or a file, and say what is broken."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from torch import Tensor

from functrain import checkpoint
from functrain.checkpoint import hub, manifest
from functrain.checkpoint.tensors import scan
from functrain.cli.options import UsageError, parse

DESCRIPTION = """Read every byte and say what is broken. A checkpoint has a checksum for each of its files. Other
safetensors files have none: their header, index and length are checked. Exits with 1 if anything is broken."""


@dataclass(frozen=True, kw_only=True)
class Options:
    what: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN|CHECKPOINT|FOLDER|FILE")]
    """A run's folder (all its checkpoints), a checkpoint's, a model's folder of safetensors, or one such file."""


def main(words: Sequence[str]) -> None:
    options = parse(Options, words, prog="functrain verify", description=DESCRIPTION)
    broken = 0
    for path, check in _parts(Path(options.what)):
        try:
            print(f"{path}: {check()}", flush=True)
        except checkpoint.CheckpointError as error:
            print(f"functrain: {error}", file=sys.stderr)
            broken += 1
    if broken:
        raise SystemExit(1)


def _parts(path: Path) -> list[tuple[Path, Callable[[], str]]]:
    """Return what is there to be read, each with the function that reads it: it returns a line, or raises."""
    if path.is_file():
        return [(path, functools.partial(_plain, lambda take: scan(path, take, links=True)))]
    if not path.is_dir():
        raise UsageError(f"{path}: no such file or folder")
    if (path / manifest.NAME).exists() or (path / manifest.TREE).exists():
        return [(path, functools.partial(_checkpoint, path))]
    if (path / hub.SINGLE).exists() or (path / hub.INDEX).exists():
        return [(path, functools.partial(_plain, functools.partial(hub.scan_folder, path)))]
    steps = checkpoint.list(path)
    if not steps:
        raise UsageError(f"{path}: expected a run, a checkpoint or a model's safetensors, and there is none in it")
    return [(step, functools.partial(_checkpoint, step)) for step in steps]


def _checkpoint(folder: Path) -> str:
    found = checkpoint.verify(folder)
    return f"whole, {len(found.leaves):,} leaves, {found.size_bytes:,} bytes, each file has its sha256"


def _plain(read: Callable[[Callable[[str, Tensor], None]], object]) -> str:
    sizes = []
    read(lambda name, tensor: sizes.append(tensor.nbytes))
    return f"well formed, {len(sizes):,} tensors, {sum(sizes):,} bytes; no checksum says whether their values are right"
