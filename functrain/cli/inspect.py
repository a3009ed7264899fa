"""`functrain inspect`: what a run, a checkpoint, a model's folder or a safetensors file holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from functrain.cli.options import UsageError, if_given, parse

DESCRIPTION = """Show what a run, a checkpoint, a model's folder or a safetensors file holds: a summary of its parts,
the model's parameters first, with numbers, bytes and dtypes. Tensors are not read, so a large file takes no time."""


@dataclass(frozen=True, kw_only=True)
class Options:
    what: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN|CHECKPOINT|FOLDER|FILE")]
    """A run's folder (its newest checkpoint), a checkpoint's, a model's of safetensors, or one such file."""
    depth: Annotated[int | None, if_given("INT")] = None
    """Names of a path by which leaves are summed up: 1 is coarse; 3, or 2 without an optimizer's state, if left out."""
    leaves: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show a line for every tensor, with its shape, below the summary."""


def main(words: Sequence[str]) -> None:
    options = parse(Options, words, prog="functrain inspect", description=DESCRIPTION)
    if options.depth is not None and options.depth < 1:
        raise UsageError(f"--depth: expected at least 1, came {options.depth}")
    # help and a wrong option need no torch, which takes seconds to load
    from functrain.cli import inspecting

    inspecting.inspect(Path(options.what), depth=options.depth, with_leaves=options.leaves)
