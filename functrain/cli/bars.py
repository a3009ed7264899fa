"""How far something is that takes long: a bar on a terminal, now and then a line elsewhere, both on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

Unit: TypeAlias = Literal["bytes", "characters", "tokens", "batches", "steps"]
_SHORT_SECONDS = 0.5  # what takes no longer is not worth a bar
_QUIET_SECONDS = 10.0  # between two lines where there is no terminal


class Bar:
    """A callback `progress(done, total)` that shows what it is told."""

    def __init__(self, label: str, unit: Unit) -> None:
        self._label, self._unit = label, unit
        self._begun = self._told = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __call__(self, done: int, total: int | None, /) -> None:
        now = time.monotonic()
        if not sys.stderr.isatty():
            if now - self._told >= _QUIET_SECONDS:
                print(f"{self._label}: {self._amount(done, total)}", file=sys.stderr, flush=True)
                self._told = now
        elif self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, amount=self._amount(done, total))
        elif now - self._begun >= _SHORT_SECONDS:
            columns = (TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.fields[amount]}"))
            console = Console(file=sys.stderr, highlight=False)
            self._bar = Progress(*columns, console=console, transient=True, expand=True)
            self._task = self._bar.add_task(self._label, completed=done, total=total, amount=self._amount(done, total))
            self._bar.start()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _amount(self, done: int, total: int | None) -> str:
        if self._unit == "bytes":
            return f"{done / 1e6:,.0f} MB" if total is None else f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB"
        return f"{done:,} {self._unit}" if total is None else f"{done:,} of {total:,} {self._unit}"


@contextmanager
def bar(label: str, unit: Unit) -> Iterator[Bar]:
    """Show how far the block is, as its functions tell the bar; nothing of it stays on a terminal."""
    shown = Bar(label, unit)
    try:
        yield shown
    finally:
        shown.close()
