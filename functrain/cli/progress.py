"""What a run shows while it trains: two live lines in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from functrain.recipes.record import Row, Show


def show() -> Show:
    """Return what fits standard output: live lines in a terminal, else one plain line for every row."""
    return Terminal() if sys.stdout.isatty() else Lines()


def printable(text: str) -> str:
    """Replace what a terminal would obey instead of show: a young model writes any byte."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


class Lines:
    def begin(self, done: int, steps: int) -> None:
        self._pace = _Pace(done, steps)
        self._evaluation = _Pace(0, 0)
        self._told = time.monotonic()

    def note(self, text: str) -> None:
        print(text, flush=True)

    def row(self, row: Row) -> None:
        self._pace.add(int(row["step"]))
        print(f"step {int(row['step'])}/{self._pace.steps}  {_numbers(row)}  ETA {self._pace.eta()}", flush=True)

    def evaluating(self, done: int, batches: int) -> None:
        if done == 0:
            self._evaluation = _Pace(0, batches)
            print(f"evaluation of {batches} batches", flush=True)
        else:
            self._evaluation.add(done)
            if time.monotonic() - self._told < _QUIET_SECONDS:
                return
            print(f"evaluation {done}/{batches}  ETA {self._evaluation.eta()}", flush=True)
        self._told = time.monotonic()

    def end(self) -> None:
        pass


_QUIET_SECONDS = 10.0


class Terminal:
    def __init__(self) -> None:
        # given its file, it draws with what that one's encoding has
        self._console = Console(file=sys.stdout, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            BarColumn(None),
            TextColumn("ETA {task.fields[eta]}"),
            expand=True,
        )
        self._numbers = Text()
        self._live = Live(Group(self._bar, self._numbers), console=self._console, refresh_per_second=4)
        self._last_validation = ""

    def begin(self, done: int, steps: int) -> None:
        self._pace = _Pace(done, steps)
        self._task = self._bar.add_task("step", total=steps, completed=done, eta="-")
        self._numbers.append("the first step compiles")
        self._live.start()

    def note(self, text: str) -> None:
        self._console.print(text, markup=False)

    def row(self, row: Row) -> None:
        self._pace.add(int(row["step"]))
        self._bar.update(self._task, completed=int(row["step"]), eta=self._pace.eta())
        if "validation_loss" in row:
            self._last_validation = _validation(row)
        self._numbers.plain = "  ".join(filter(None, [_training(row), self._last_validation]))

    def evaluating(self, done: int, batches: int) -> None:
        if done == 0:
            self._evaluation = _Pace(0, batches)
            self._evaluated = self._bar.add_task("evaluation", total=batches, eta="-")
        else:
            self._evaluation.add(done)
        self._bar.update(self._evaluated, completed=done, eta=self._evaluation.eta())

    def end(self) -> None:
        self._live.stop()


class _Pace:
    """Time left, from the steps after the first one, which holds the compile time."""

    def __init__(self, done: int, steps: int) -> None:
        self.steps, self._first, self._last = steps, (done, time.monotonic()), (done, time.monotonic())
        self._rows = 0

    def add(self, step: int) -> None:
        self._last = (step, time.monotonic())
        self._rows += 1
        if self._rows == 1:
            self._first = self._last

    def eta(self) -> str:
        steps, seconds = self._last[0] - self._first[0], self._last[1] - self._first[1]
        if not steps:
            return "-"
        left = round((self.steps - self._last[0]) * seconds / steps)
        minutes, seconds_left = divmod(left, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds_left:02d}" if hours else f"{minutes}:{seconds_left:02d}"


def _numbers(row: Row) -> str:
    return "  ".join(filter(None, [_training(row), _validation(row)]))


def _training(row: Row) -> str:
    skipped, back = int(row.get("skipped_in_all", 0)), int(row.get("rolled_back", 0))
    return (
        f"loss {row['loss']:.4f}  lr {row['learning_rate']:.1e}  grad norm {row['grad_norm']:.2f}  "
        f"{_short(row['tokens_per_second'])} tokens/s"
        + (f"  skipped {skipped}" if skipped else "")
        + (f"  went back {back}" if back else "")
    )


def _validation(row: Row) -> str:
    if "validation_loss" not in row:
        return ""
    return f"validation {row['validation_loss']:.4f} ({row['validation_bits_per_byte']:.3f} bits per byte)"


def _short(number: float) -> str:
    return f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number / 1e3:.1f}k" if number >= 1e3 else f"{number:.0f}"
