"""`functrain plot`: the learning curves of runs as one picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import matplotlib.figure
import numpy
import tyro
from numpy.typing import NDArray

from functrain.cli.options import UsageError, parse
from functrain.recipes import record
from functrain.recipes.record import Row


@dataclass(frozen=True, kw_only=True)
class Options:
    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN...]")]
    """Folders of runs."""
    out: str = ""
    """The picture; RUN/loss.png for one run and ./loss.png for several, if it is left out."""


def main(words: Sequence[str]) -> None:
    options = parse(Options, words, prog="functrain plot", description="Draw the learning curves of runs.")
    if not options.runs:
        raise UsageError("plot: expected the folder of a run; functrain plot RUN [RUN...]")
    runs = [Path(run) for run in options.runs]
    out = Path(options.out) if options.out else (runs[0] if len(runs) == 1 else Path()) / "loss.png"
    draw(runs, out)
    print(out)


def draw(runs: Sequence[Path], out: Path) -> None:
    """Draw bits per byte against steps: training (smoothed over what is faint), validation, and the trigram's line.

    Raises: UsageError naming a run that has recorded nothing.
    """
    figure = matplotlib.figure.Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for i, run in enumerate(runs):
        rows = _rows(run)
        prefix, color = (f"{run.name or run}: " if len(runs) > 1 else ""), f"C{i}"
        steps, train = [row["step"] for row in rows], [row["bits_per_byte"] for row in rows]
        axes.plot(steps, train, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(train), color=color, linewidth=1.2, label=f"{prefix}train")
        seen = [row for row in rows if "validation_bits_per_byte" in row]
        axes.plot(
            [row["step"] for row in seen],
            [row["validation_bits_per_byte"] for row in seen],
            color="black" if len(runs) == 1 else color,
            marker="o",
            markersize=3,
            linestyle="--",
            label=f"{prefix}validation",
        )
    for value in sorted({value for run in runs if (value := _trigram(run)) is not None}):
        axes.axhline(value, color="gray", linestyle=":", label=f"trigram model {value:.3f}")
    axes.set_xlabel("steps")
    axes.set_ylabel("bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def _rows(run: Path) -> list[Row]:
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UsageError(f"{run}: expected the folder of a run, and it has no metrics.jsonl")
    rows = record.rows(path)
    if not rows:
        raise UsageError(f"{path}: no step has been recorded yet")
    return rows


def _trigram(run: Path) -> float | None:
    path = run / "summary.json"
    return json.loads(path.read_text(encoding="utf-8"))["trigram_bits_per_byte"] if path.is_file() else None


def _smooth(values: list[float]) -> NDArray[numpy.float64]:
    """Average each value with its neighbours on both sides: a fiftieth of the run, less at the ends."""
    window = numpy.ones(min(len(values), len(values) // 50 * 2 + 1))
    count = numpy.convolve(numpy.ones(len(values)), window, "same")
    return numpy.convolve(values, window, "same") / count
