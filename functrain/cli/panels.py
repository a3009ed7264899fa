"""One panel of a picture of learning curves: a metric of several runs against steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
from numpy.typing import NDArray

from functrain.recipes.record import Row

_LABELS = {"bits_per_byte": "bits per byte", "grad_norm": "gradient norm", "learning_rate": "learning rate"}
_SMOOTH = {"learning_rate"}  # as they are: no noise to be averaged away


class Curves(NamedTuple):
    """What a run has recorded, and how it is drawn."""

    name: str  # in the legend; empty for one run alone
    color: str
    rows: Sequence[Row]


def draw(axes: Any, name: str, curves: Sequence[Curves], *, lines: Sequence[float] = ()) -> None:
    """Draw a metric and its validation into axes of matplotlib; `lines` are values to compare with.

    The scale is that of what is no spike, which the legend counts.
    """
    values = [row.get(key, math.nan) for curve in curves for row in curve.rows for key in (name, f"validation_{name}")]
    values = [value for value in values if math.isfinite(value)]
    top = _top(values)
    for curve in curves:
        _draw_one(axes, name, curve, top)
    for value in lines:
        axes.axhline(value, color="gray", linestyle=":", label=f"trigram model {value:.3f}")
    if math.isfinite(top):
        low = min([*values, *lines])
        margin = 0.05 * (top - low) or 1.0
        axes.set_ylim(low - margin, top + margin)
    axes.set_ylabel(_LABELS.get(name, name).replace("$", r"\$"))
    axes.grid(alpha=0.3)


def _draw_one(axes: Any, name: str, curve: Curves, top: float) -> None:
    of = f", {curve.name}" if curve.name else ""
    rows = [row for row in curve.rows if name in row]
    steps, train = [row["step"] for row in rows], [row[name] for row in rows]
    above = sum(value > top for value in train)
    label = f"train{of}" + (f" ({above} steps above {top:.3g})" if above else "")
    if name in _SMOOTH:
        axes.plot(steps, train, color=curve.color, linewidth=1.2, label=label)
    else:
        axes.plot(steps, train, color=curve.color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(train), color=curve.color, linewidth=1.2, label=label)
    seen = [row for row in curve.rows if f"validation_{name}" in row]
    axes.plot(
        [row["step"] for row in seen],
        [row[f"validation_{name}"] for row in seen],
        color=curve.color if curve.name else "black",
        marker="o",
        markersize=3,
        linestyle="--",
        label=f"validation{of}",
    )


def _top(values: list[float]) -> float:
    """Return the largest value that is no spike, far above all but the highest fiftieth; infinite without spikes."""
    if not values:
        return math.inf
    found = numpy.sort(values)
    usual = found[: max(1, math.ceil(len(found) * 0.98) - 1)]
    limit = usual[-1] + 3.0 * max(usual[-1] - usual[0], 1.0)
    return math.inf if found[-1] <= limit else float(found[found <= limit][-1])


def _smooth(values: list[float]) -> NDArray[numpy.float64]:
    """Average each finite value with its finite neighbours on both sides: a fiftieth of the run, less at the ends."""
    if not values:
        return numpy.array([])
    found = numpy.array(values)
    finite = numpy.isfinite(found)
    window = numpy.ones(min(len(values), len(values) // 50 * 2 + 1))
    count = numpy.convolve(finite, window, "same")
    total = numpy.convolve(numpy.where(finite, found, 0.0), window, "same")
    return numpy.where(finite, total / numpy.maximum(count, 1.0), numpy.nan)
