"""`functrain verify`: read every byte of a run's checkpoints, of a model's folder or a file, and say what is broken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from functrain.cli.options import parse

DESCRIPTION = """Read every byte and say what is broken. A checkpoint has a checksum for each of its files. Other
safetensors files have none: their header, index and length are checked. Exits with 1 if anything is broken."""


@dataclass(frozen=True, kw_only=True)
class Options:
    what: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN|CHECKPOINT|FOLDER|FILE")]
    """A run's folder (all its checkpoints), a checkpoint's, a model's folder of safetensors, or one such file."""


def main(words: Sequence[str]) -> None:
    options = parse(Options, words, prog="functrain verify", description=DESCRIPTION)
    # help and a wrong option need no torch, which takes seconds to load
    from functrain.cli import verifying

    if not verifying.verify(Path(options.what)):
        raise SystemExit(1)
