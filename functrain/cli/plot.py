"""`functrain plot`: the learning curves of runs as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from functrain.cli.options import UsageError, if_given, parse

DESCRIPTION = """Draw the learning curves of runs, several in one picture: those of `functrain train`, and any other
whose metrics.jsonl `ft.train.record` wrote. Below the loss stand the learning rate and the gradient's norm, where they
were recorded."""


@dataclass(frozen=True, kw_only=True)
class Options:
    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], if_given("RUN [RUN...]")]
    """Folders of runs."""
    out: Annotated[str | None, if_given("FILE")] = None
    """The picture; RUN/loss.png for one run and ./loss.png for several, if it is left out."""
    panels: Annotated[str | None, if_given("NAME,NAME,...")] = None
    """The metrics to draw: each has a panel, with its validation_NAME in it. The loss is drawn as bits
    per byte where all runs have those. Loss, learning_rate and grad_norm if it is left out."""


def main(words: Sequence[str]) -> None:
    options = parse(Options, words, prog="functrain plot", description=DESCRIPTION)
    if not options.runs:
        raise UsageError("plot: expected the folder of a run; functrain plot RUN [RUN...]")
    runs = [Path(run) for run in options.runs]
    out = Path(options.out) if options.out else (runs[0] if len(runs) == 1 else Path()) / "loss.png"
    # help and a wrong option need no torch, which takes seconds to load
    from functrain.cli import plotting

    panels = [name.strip() for name in (options.panels or "").split(",") if name.strip()]
    print(plotting.draw(runs, out, panels=panels))
