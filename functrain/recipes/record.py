"""The record of a run: one line of `metrics.jsonl` per step, TensorBoard events, and what a person is shown."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

Row: TypeAlias = dict[str, float]  # "step", "loss", "grad_norm", "learning_rate", ...
_log = logging.getLogger(__name__)


class Show(Protocol):
    """Where a run's progress goes: a terminal, lines of text, nowhere."""

    def begin(self, done: int, steps: int) -> None: ...

    def note(self, text: str) -> None: ...

    def row(self, row: Row) -> None: ...

    def evaluating(self, done: int, batches: int) -> None:
        """Show how much of the evaluation at the end is done."""

    def end(self) -> None: ...


class Record:
    """A hook for `fit` that records each step exactly once, resumed or not.

    It keeps the metrics of a step as tensors and reads many steps at once every `every` steps, so the device is not
    waited for in between. `metrics.jsonl` holds one JSON object a line; a number that JSON lacks is the string "nan",
    "inf" or "-inf". Opening it at step `done`, or going back there, drops the lines after that step: a killed run has
    written them in advance of its checkpoint. A step that is not finite, or that a guard skipped, is shown by itself.
    """

    def __init__(
        self,
        run: Path,
        done: int,
        *,
        every: int,
        learning_rate: Callable[[int], float],
        bits_per_byte: float,
        show: Show,
    ) -> None:
        self._every, self._learning_rate, self._show = every, learning_rate, show
        self._bits_per_byte = bits_per_byte
        self._run, self._path = run, run / "metrics.jsonl"
        self._first = done + 1
        self._waiting: list[tuple[int, dict[str, Any]]] = []
        self._bad_in_row = 0
        self._open(done)
        self._since = time.perf_counter()

    def __call__(self, t: int, state: Any, metrics: dict[str, Any]) -> None:
        self._waiting.append((t, dict(metrics)))
        # the first step of a process is read at once: it holds the compile time and shows that the run lives
        if t % self._every == 0 or t == self._first:
            self.read()

    def begin(self, t: int, steps: int, state: Any) -> None:
        """Go on from step t: write and show what waits, then drop what came after it."""
        self.read()
        self._close_files()
        self._open(t)
        self._bad_in_row = 0

    def flush(self) -> None:
        self.read()

    def aside(self, seconds: float) -> None:
        """Leave so long out of the tokens per second: evaluations, saves."""
        self._since += seconds

    def read(self) -> None:
        """Read the metrics of all steps that wait, write and show them."""
        if not self._waiting:
            return
        read = _read([metrics for _, metrics in self._waiting])  # waits for the device
        now = time.perf_counter()
        tokens_per_second = sum(numbers["weight"] for numbers in read) / (now - self._since)
        rows = []
        for (t, _), numbers in zip(self._waiting, read, strict=True):
            row: Row = {"step": t, **numbers}
            row["bits_per_byte"] = row["loss"] * self._bits_per_byte
            row["learning_rate"] = self._learning_rate(t - 1)
            row["tokens_per_second"] = tokens_per_second
            rows.append(row)
        self._waiting.clear()
        self._write(rows)
        self._show.row(rows[-1])
        self._tell_bad(rows)
        self._since = time.perf_counter()

    def close(self) -> None:
        self.read()
        self._close_files()

    def _close_files(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def _open(self, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        keep(self._path, done)
        self._file = open(self._path, "a", encoding="utf-8")
        self._events: Any = None
        try:
            str(self._run).encode("utf-8")
        except UnicodeEncodeError:
            self._show.note("no TensorBoard events: it takes no folder whose name is not UTF-8")
        else:
            self._events = SummaryWriter(str(self._run / "tensorboard"), purge_step=done + 1)

    def _write(self, rows: list[Row]) -> None:
        self._file.writelines(json.dumps({name: readable(value) for name, value in row.items()}) + "\n" for row in rows)
        self._file.flush()
        if self._events is None:
            return
        for row in rows:
            for name, value in row.items():
                if name != "step":
                    self._events.add_scalar(name, value, int(row["step"]))
        self._events.flush()

    def _tell_bad(self, rows: list[Row]) -> None:
        for row in rows:
            finite = math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
            if finite and not row.get("skipped"):
                self._bad_in_row = 0
                continue
            self._bad_in_row += 1
            what = f"step {int(row['step'])}: loss {row['loss']:.6g}, gradient norm {row['grad_norm']:.6g}"
            done = "skipped" if row.get("skipped") else "not finite"
            self._show.note(f"{what}: {done} ({self._bad_in_row} in a row)")


def _read(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Read () tensors and numbers; those of all steps come from the device at once."""
    tensors = [value.to(torch.float64) for row in rows for value in row.values() if isinstance(value, Tensor)]
    numbers = iter(torch.stack(tensors).tolist() if tensors else ())
    return [{n: next(numbers) if isinstance(v, Tensor) else float(v) for n, v in row.items()} for row in rows]


def keep(path: Path, done: int) -> None:
    """Drop from a metrics file the lines after step `done`, a last line that a kill cut short, and damaged ones."""
    if not path.exists():
        return
    staging = path.with_suffix(".jsonl.tmp")
    staging.write_bytes(b"".join(line for line, row in _lines(path) if row["step"] <= done))
    os.replace(staging, path)


def rows(path: Path) -> list[Row]:
    """Read a metrics file: one dict of floats for each step, in order. A damaged line is left out with a warning."""
    return [row for _, row in _lines(path)]


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
