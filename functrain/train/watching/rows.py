"""The file metrics.jsonl: one JSON object a line, one line a step."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

Row: TypeAlias = dict[str, float]  # "step", "loss", "grad_norm", "learning_rate", ...

# what depends on the clock and the machine: the rest of a row is the same in a run that was killed and went on
OF_THE_MACHINE = frozenset(
    ["time", "seconds", "first_step_seconds", "samples_per_second", "tokens_per_second", "model_flops_utilization",
     "process_memory_bytes", "device_memory_bytes"]
)  # fmt: skip
_log = logging.getLogger(__name__)


def rows(path: str | os.PathLike[str]) -> list[Row]:
    """Read a metrics file: one dict of floats for each step, in order. A damaged line is left out with a warning.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as run:
    ...     record = ft.train.record(run)
    ...     record(1, None, {"loss": 0.5})
    ...     ft.train.watching.rows(f"{run}/metrics.jsonl")[0]["loss"]
    0.5
    """
    return [row for _, row in _lines(Path(path))]


def keep(path: Path, done: int) -> None:
    """Drop from a metrics file the lines after step `done`, a last line that a kill cut short, and damaged ones."""
    if not path.exists():
        return
    staging = path.with_suffix(".jsonl.tmp")
    staging.write_bytes(b"".join(line for line, row in _lines(path) if row["step"] <= done))
    os.replace(staging, path)


def lines(rows: Iterable[Row]) -> Iterator[str]:
    """Return the lines of a metrics file; a number that JSON lacks is the string "nan", "inf" or "-inf"."""
    return (json.dumps({name: readable(value) for name, value in row.items()}) + "\n" for row in rows)


def readable(value: float) -> float | str:
    """Return a number as JSON can hold it: what is not finite as "nan", "inf" or "-inf"."""
    return value if math.isfinite(value) else str(value)


def _lines(path: Path) -> list[tuple[bytes, Row]]:
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break  # a kill cut it short
        try:
            row = {str(name): float(value) for name, value in json.loads(line.decode("utf-8")).items()}
            row["step"]
        except (ValueError, TypeError, LookupError, AttributeError):
            _log.warning("%s: line %d is damaged and left out", path, number)
        else:
            found.append((line, row))
    return found
