"""Where progress is shown: two live lines in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any, Protocol

from functrain.train.watching.rows import OF_THE_MACHINE, Row


class Display(Protocol):
    """Where a run's progress goes: a terminal, lines of text, nowhere."""

    def begin(self, done: int, steps: int) -> None: ...

    def note(self, text: str) -> None: ...

    def row(self, row: Row) -> None: ...

    def evaluating(self, done: int, batches: int | None) -> None:
        """Show how much of an evaluation is done."""

    def end(self) -> None: ...


def display(metrics: Sequence[str] | None = None) -> Display:
    """Return what fits standard output: live lines in a terminal that rich can draw in, else one plain line for every
    row.

    `metrics` are shown beside loss, learning rate, gradient norm and rates; all, if it is None.
    """
    if not sys.stdout.isatty():
        return Lines(metrics)
    try:
        return Terminal(metrics)
    except ImportError:  # rich is an extra; what it draws is the same in lines
        return Lines(metrics)


class Lines:
    def __init__(self, metrics: Sequence[str] | None = None) -> None:
        self._metrics = metrics

    def begin(self, done: int, steps: int) -> None:
        self._pace = Pace(done, steps)
        self._evaluation = Pace(0, 0)
        self._told = time.monotonic()

    def note(self, text: str) -> None:
        print(text, flush=True)

    def row(self, row: Row) -> None:
        self._pace.add(int(row["step"]))
        numbers = "  ".join(filter(None, [training(row, self._metrics), validation(row)]))
        print(f"step {int(row['step'])}/{self._pace.steps}  {numbers}  ETA {self._pace.eta()}", flush=True)

    def evaluating(self, done: int, batches: int | None) -> None:
        if done == 0:
            self._evaluation = Pace(0, batches or 0)
            print("evaluation" if batches is None else f"evaluation of {batches} batches", flush=True)
        else:
            self._evaluation.add(done)
            if time.monotonic() - self._told < _QUIET_SECONDS:
                return
            of = "" if batches is None else f"/{batches}  ETA {self._evaluation.eta()}"
            print(f"evaluation {done}{of}", flush=True)
        self._told = time.monotonic()

    def end(self) -> None:
        pass


_QUIET_SECONDS = 10.0


class Terminal:
    def __init__(self, metrics: Sequence[str] | None = None) -> None:
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.text import Text

        self._metrics = metrics
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
        self._task: Any = None
        self._evaluated: Any = None

    def begin(self, done: int, steps: int) -> None:
        self._pace = Pace(done, steps)
        if self._task is None:
            self._task = self._bar.add_task("step", total=steps, completed=done, eta="-")
            self._numbers.append("the first step compiles")
            self._live.start()
        self._bar.update(self._task, completed=done, eta="-")

    def note(self, text: str) -> None:
        self._console.print(text, markup=False)

    def row(self, row: Row) -> None:
        self._pace.add(int(row["step"]))
        self._bar.update(self._task, completed=int(row["step"]), eta=self._pace.eta())
        self._last_validation = validation(row) or self._last_validation
        self._numbers.plain = "  ".join(filter(None, [training(row, self._metrics), self._last_validation]))

    def evaluating(self, done: int, batches: int | None) -> None:
        if self._evaluated is None:
            self._evaluated = self._bar.add_task("evaluation", total=batches, eta="-")
        if done == 0:
            self._evaluation = Pace(0, batches or 0)
            self._bar.reset(self._evaluated, total=batches)
        else:
            self._evaluation.add(done)
        eta = "-" if batches is None else self._evaluation.eta()
        self._bar.update(self._evaluated, completed=done, eta=eta)

    def end(self) -> None:
        self._live.stop()


class Pace:
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


_SAID = OF_THE_MACHINE | {
    "step", "loss", "learning_rate", "grad_norm", "weight", "epoch", "skipped", "skipped_in_row", "skipped_in_all",
    "rolled_back",
}  # fmt: skip


def training(row: Row, metrics: Sequence[str] | None) -> str:
    """Return the numbers of a row as words, but for those of its validation."""
    shown = [name for name in row if name not in _SAID and not name.startswith("validation_")]
    parts = [f"epoch {row['epoch']:.2f}"] if "epoch" in row else []
    parts += [f"loss {row['loss']:.4f}"] if "loss" in row else []
    parts += [f"{name.replace('_', ' ')} {row[name]:.4g}" for name in shown if metrics is None or name in metrics]
    parts += [f"lr {row['learning_rate']:.1e}"] if "learning_rate" in row else []
    parts += [f"grad norm {row['grad_norm']:.2f}"] if "grad_norm" in row else []
    parts += [f"{_short(row[f'{n}_per_second'])} {n}/s" for n in ("samples", "tokens") if f"{n}_per_second" in row]
    if "model_flops_utilization" in row:
        parts.append(f"MFU {row['model_flops_utilization']:.1%}")
    skipped, back = int(row.get("skipped_in_all", 0)), int(row.get("rolled_back", 0))
    parts += [f"skipped {skipped}"] if skipped else []
    parts += [f"went back {back}"] if back else []
    return "  ".join(parts)


def validation(row: Row) -> str:
    """Return the numbers of a row's validation as words, if it has one."""
    found = {name.removeprefix("validation_"): value for name, value in row.items() if name.startswith("validation_")}
    others = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in found.items() if name != "loss")
    if "loss" not in found:
        return f"validation {others}" if others else ""
    return f"validation {found['loss']:.4f}" + (f" ({others})" if others else "")


def _short(number: float) -> str:
    return f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number / 1e3:.1f}k" if number >= 1e3 else f"{number:.0f}"
