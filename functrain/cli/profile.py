"""`functrain profile`: where the time and the memory of a run's training step go."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from functrain.cli import architecture
from functrain.cli.options import UsageError, if_given, parse
from functrain.recipes.config import PRESETS, Config

DESCRIPTION = """Run a few training steps under torch.profiler, those of a run or of a preset of `functrain train`, with
changes as there, and show what takes their time and memory. The run itself is left as it is: the model begins anew.

A trace of every operation is written for ui.perfetto.dev or chrome://tracing."""


@dataclass(frozen=True, kw_only=True)
class Options:
    config: Annotated[Config, tyro.conf.arg(name="")]
    warmup: int = 2
    """Steps after the first, which compiles, that are not measured."""
    active: int = 5
    """Steps that are measured: by the clock, then under the profiler."""
    sort: Literal["time", "memory"] = "time"
    """What the operations are sorted by."""
    rows: int = 15
    """Operations in the table."""
    trace: Annotated[str | None, if_given("FILE")] = None
    """The trace's file; RUN/trace.json.gz for a run, ./trace.json.gz for a preset, if it is left out."""


def main(words: Sequence[str]) -> None:
    if not words or words[0].startswith("-") and not {"-h", "--help"} & set(words):
        raise UsageError("profile: expected a run or a preset; functrain profile RUN|PRESET")
    what, rest = ("tiny", words) if words[0].startswith("-") else (words[0], words[1:])
    run, asked = _asked(what)
    asked, rest = architecture.chosen(asked, rest)
    options = parse(
        Options, rest, prog="functrain profile RUN|PRESET", description=DESCRIPTION, default=Options(config=asked)
    )
    for name, value, least in (("warmup", options.warmup, 0), ("active", options.active, 1), ("rows", options.rows, 1)):
        if value < least:
            raise UsageError(f"--{name}: expected at least {least}, came {value}")
    trace = Path(options.trace) if options.trace else (run or Path()) / "trace.json.gz"
    if trace.is_dir() or not trace.name.endswith((".json", ".json.gz")):
        raise UsageError(f"--trace: expected a file that ends in .json or .json.gz, came {trace}")
    # help and a wrong option need no torch, which takes seconds to load
    from functrain.cli import profiling

    profiling.profile(
        options.config,
        what,
        run,
        asked,
        trace,
        warmup=options.warmup,
        active=options.active,
        sort=options.sort,
        rows=options.rows,
    )


def _asked(what: str) -> tuple[Path | None, Config]:
    if what in PRESETS:
        return None, PRESETS[what]
    if (Path(what) / "config.toml").is_file():
        from functrain.recipes import folder  # which needs torch

        return Path(what), folder.read_config(Path(what))
    close = difflib.get_close_matches(what, PRESETS, 1)
    known = f"did you mean {close[0]}?" if close else f"presets are {', '.join(PRESETS)}"
    raise UsageError(f"{what}: expected the folder of a run or a preset, and there is none; {known}")
