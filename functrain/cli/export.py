"""`functrain export`: a run's model as a folder that Hugging Face transformers loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from functrain.cli.options import if_given, parse

DESCRIPTION = """Write the model of a run's newest whole checkpoint as a folder that transformers loads: config.json,
model.safetensors, and the tokenizer. The folder appears whole or not at all, and nothing is overwritten."""


@dataclass(frozen=True, kw_only=True)
class Options:
    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    to: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    """The folder to make."""
    step: Annotated[int | None, if_given("INT")] = None
    """The step whose checkpoint is exported; the newest if it is left out."""


def main(words: Sequence[str]) -> None:
    options = parse(Options, words, prog="functrain export", description=DESCRIPTION)
    # help and a wrong option need no torch, which takes seconds to load
    from functrain.cli import exporting

    exporting.export(Path(options.run), Path(options.to), step=options.step)
