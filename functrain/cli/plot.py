"""`functrain plot`: the learning curves of runs as one picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
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
    print(draw(runs, out))


def draw(runs: Sequence[Path], out: Path) -> Path:
    """Draw bits per byte against steps: training (smoothed over what is faint), validation, and the trigram's line.

    Returns the picture's path: `out`, and .png without an ending. Spikes leave the picture, and its legend counts them.
    Raises: UsageError naming a run that has recorded nothing, or a kind of picture that there is not.
    """
    figure = matplotlib.figure.Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    out = _checked(out, figure.canvas.get_supported_filetypes())
    records = [_rows(run) for run in runs]
    values = [row.get(name, math.nan) for rows in records for row in rows for name in _CURVES]
    values = [value for value in values if math.isfinite(value)]
    top = _top(values)
    for i, (run, rows) in enumerate(zip(runs, records, strict=True)):
        of, color = (f", {_name(run)}" if len(runs) > 1 else ""), f"C{i}"
        steps, train = [row["step"] for row in rows], [row.get("bits_per_byte", math.nan) for row in rows]
        above = sum(value > top for value in train)
        axes.plot(steps, train, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(
            steps,
            _smooth(train),
            color=color,
            linewidth=1.2,
            label=f"train{of}" + (f" ({above} steps above {top:.3g})" if above else ""),
        )
        seen = [row for row in rows if "validation_bits_per_byte" in row]
        axes.plot(
            [row["step"] for row in seen],
            [row["validation_bits_per_byte"] for row in seen],
            color="black" if len(runs) == 1 else color,
            marker="o",
            markersize=3,
            linestyle="--",
            label=f"validation{of}",
        )
    trigrams = sorted({value for run in runs if (value := _trigram(run)) is not None})
    for value in trigrams:
        axes.axhline(value, color="gray", linestyle=":", label=f"trigram model {value:.3f}")
    if math.isfinite(top):
        low = min([*values, *trigrams])
        margin = 0.05 * (top - low) or 1.0
        axes.set_ylim(low - margin, top + margin)
    axes.set_title(", ".join(map(_name, runs)))
    axes.set_xlabel("steps")
    axes.set_ylabel("bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    return out


def _rows(run: Path) -> list[Row]:
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UsageError(f"{run}: expected the folder of a run, and it has no metrics.jsonl")
    rows = record.rows(path)
    if not rows:
        raise UsageError(f"{path}: no step has been recorded yet")
    return rows


_CURVES = ("bits_per_byte", "validation_bits_per_byte")


def _top(values: list[float]) -> float:
    """Return the largest value that is no spike, far above all but the highest fiftieth; infinite without spikes."""
    if not values:
        return math.inf
    found = numpy.sort(values)
    usual = found[: max(1, math.ceil(len(found) * 0.98) - 1)]
    limit = usual[-1] + 3.0 * max(usual[-1] - usual[0], 1.0)
    return math.inf if found[-1] <= limit else float(found[found <= limit][-1])


def _checked(out: Path, kinds: Mapping[str, str]) -> Path:
    if out.is_dir():
        raise UsageError(f"--out: {out}: expected a name for the picture, came a folder; name a file in it")
    kind = out.suffix.lower().removeprefix(".")
    if kind and kind not in kinds:
        raise UsageError(f"--out: {out}: expected a picture of kind {', '.join(sorted(kinds))}, came {kind!r}")
    return out if kind else out.with_name(out.name.rstrip(".") + ".png")


def _name(run: Path) -> str:
    # as it is shown: the bytes of no UTF-8 replaced, and no formula begun
    name = (run.name or str(run)).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return name.replace("$", r"\$")


def _trigram(run: Path) -> float | None:
    """Return the trigram model's bits per byte; None where no summary says it."""
    try:
        value = float(json.loads((run / "summary.json").read_bytes())["trigram_bits_per_byte"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return value if math.isfinite(value) else None


def _smooth(values: list[float]) -> NDArray[numpy.float64]:
    """Average each finite value with its finite neighbours on both sides: a fiftieth of the run, less at the ends."""
    found = numpy.array(values)
    finite = numpy.isfinite(found)
    window = numpy.ones(min(len(values), len(values) // 50 * 2 + 1))
    count = numpy.convolve(finite, window, "same")
    total = numpy.convolve(numpy.where(finite, found, 0.0), window, "same")
    return numpy.where(finite, total / numpy.maximum(count, 1.0), numpy.nan)
