"""What `functrain plot` draws."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import matplotlib.figure

from functrain.cli import panels as panels_of
from functrain.cli.options import UsageError
from functrain.cli.panels import Curves
from functrain.recipes import record
from functrain.recipes.record import Row


def draw(runs: Sequence[Path], out: Path, *, panels: Sequence[str] = ()) -> Path:
    """Draw metrics of runs against steps: of training (smoothed over what is faint), of validation, and for bits per
    byte the trigram model's line.

    Returns the picture's path: `out`, and .png without an ending. Spikes leave the picture, and its legend counts them.
    Raises: UsageError naming a run that has recorded nothing, a metric that none has, or a kind of picture that there
    is not.
    """
    figure = matplotlib.figure.Figure(layout="constrained", dpi=120)
    out = _checked(out, figure.canvas.get_supported_filetypes())
    curves = [Curves(_name(run) if len(runs) > 1 else "", f"C{i}", _rows(run)) for i, run in enumerate(runs)]
    chosen = _chosen(panels, curves)
    heights = [5.0, *[2.0] * (len(chosen) - 1)]
    figure.set_size_inches(8.0, sum(heights))
    # as many axes as panels, one below the other, on one scale of steps
    all_axes = figure.subplots(len(chosen), sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    trigrams = sorted({value for run in runs if (value := _trigram(run)) is not None})
    for name, axes in zip(chosen, all_axes, strict=True):
        panels_of.draw(axes, name, curves, lines=trigrams if name == "bits_per_byte" else [])
    all_axes[0].set_title(", ".join(map(_name, runs)))
    all_axes[0].legend()
    all_axes[-1].set_xlabel("steps")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    return out


def _chosen(asked: Sequence[str], curves: Sequence[Curves]) -> list[str]:
    """Return the metrics to draw: those asked for, or what there is of the usual ones."""
    held = [{name for row in curve.rows for name in row} for curve in curves]
    loss = "bits_per_byte" if all("bits_per_byte" in names for names in held) else "loss"
    there = sorted(set().union(*held) - {"step"})
    found = []
    for name in asked:
        wanted = loss if name == "loss" else name
        if wanted not in there and f"validation_{wanted}" not in there:
            raise UsageError(f"--panels: no run has recorded {name!r}; there are {', '.join(there) or 'none'}")
        found.append(wanted)
    if found:
        return list(dict.fromkeys(found))
    if loss not in there and f"validation_{loss}" not in there:
        raise UsageError(f"plot: no run has recorded a loss; name what to draw with --panels, of {', '.join(there)}")
    return [loss, *[name for name in ("learning_rate", "grad_norm") if name in there]]


def _rows(run: Path) -> list[Row]:
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UsageError(f"{run}: expected the folder of a run, and it has no metrics.jsonl")
    rows = record.rows(path)
    if not rows:
        raise UsageError(f"{path}: no step has been recorded yet")
    return rows


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
