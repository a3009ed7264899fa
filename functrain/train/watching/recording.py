"""The record of a run: one line of metrics.jsonl per step, whatever was killed, and loggers beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from functrain.train.hooks import Metrics
from functrain.train.watching.logger import Logger
from functrain.train.watching.meter import Meter
from functrain.train.watching.rows import Row, keep, lines, rows


def record(
    run: str | os.PathLike[str],
    *,
    loggers: Sequence[Logger] = (),
    every: int = 10,
    learning_rate: Callable[[Any], Any] | None = None,
    steps_per_epoch: float | None = None,
    samples: int | str | None = None,
    tokens: int | str | None = None,
    flops: float | None = None,
    peak_flops: float | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
) -> Record:
    """Return a hook for `fit` that writes a line of RUN/metrics.jsonl for each step, and tells `loggers`, such as
    `ft.train.watching.tensorboard(run)`.

    Each step is there exactly once, whatever was killed, resumed, or went back: the lines up to a checkpoint are on the
    disk before it is, and those after the step where a run goes on are dropped. Metrics are read every `every` steps,
    many at once, so that the device is not waited for in between; the first step of a process is read by itself.
    `ft.train.watching.rows(file)` reads them.

    A line has the step, its metrics, those of `ft.train.validate` too, "time" in seconds since 1970, "seconds" since
    the run began, "process_memory_bytes" and on CUDA "device_memory_bytes", the most so far; and where they are asked
    for

    - "learning_rate", of a schedule, at the count of updates before the step;
    - "epoch", with `steps_per_epoch`, such as the length of a data loader;
    - "samples_per_second" and "tokens_per_second", of `samples` and `tokens` in a step, or of the metrics of that name:
      `tokens="weight"` for the losses of language models. Evaluations and saves are left out of the time, and what the
      first step takes to compile is its "first_step_seconds";
    - "model_flops_utilization", of `flops`, those of a step, such as the tokens of a batch times
      `ft.models.training_flops_of(config)`, and `peak_flops`, those of the device in a second, such as
      `ft.train.watching.peak_flops("cuda")`.

    In a loop of one's own, call it as `record(t, state, metrics)` after step t, from 1, and `record.close()` at the
    end, after `record.fail(error)` if it is an error; `record.begin(t, steps, state)` before, where the run goes on
    from step t. Of several ranks, one has it.

    Raises: ValueError for numbers that cannot be; from the hook, for metrics that are no numbers or () tensors, and for
    a metric to count that is not there.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as run:
    ...     record = ft.train.record(run, learning_rate=ft.schedules.linear_schedule(0.5, 0.0, 2))
    ...     record(1, None, {"loss": 1.0})  # as ft.fit does with every=[record]
    ...     record(2, None, {"loss": torch.tensor(0.25)})
    ...     record.close()
    ...     [(row["step"], row["loss"], row["learning_rate"]) for row in ft.train.watching.rows(f"{run}/metrics.jsonl")]
    [(1.0, 1.0, 0.5), (2.0, 0.25, 0.25)]
    """
    meter = Meter(
        "record", every=every, learning_rate=learning_rate, steps_per_epoch=steps_per_epoch, samples=samples,
        tokens=tokens, flops=flops, peak_flops=peak_flops,
    )  # fmt: skip
    return Record(Path(run) / "metrics.jsonl", list(loggers), meter, dict(hyperparameters or {}))


class Record:
    """The hook that `record` returns."""

    def __init__(self, path: Path, loggers: list[Logger], meter: Meter, hyperparameters: dict[str, Any]) -> None:
        self._path, self._loggers, self._meter, self._hyperparameters = path, loggers, meter, hyperparameters
        self._begun = False

    def __call__(self, t: int, state: Any, metrics: Metrics) -> None:
        if not self._begun:
            self.begin(t - 1, t, state)
        if self._meter.add(t, state, metrics):
            self.flush()

    def begin(self, t: int, steps: int, state: Any) -> None:
        """Go on after step t: lines of later ones, of a run that was killed or went back, are dropped."""
        self.flush()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        keep(self._path, t)
        before = rows(self._path)[-1:] if self._path.exists() else []
        self._meter.begin(t, before[0].get("seconds", 0.0) if before else 0.0)
        for logger in self._loggers:
            logger.begin(t)
            if not self._begun and self._hyperparameters and hasattr(logger, "hyperparameters"):
                logger.hyperparameters(dict(_flat(self._hyperparameters)))
        self._begun = True

    def flush(self) -> None:
        """Read the metrics of all steps that wait, and write them."""
        found: list[Row] = self._meter.read()
        if found:
            # opened for each reading, so that a loop that never calls close leaves nothing open
            with open(self._path, "a", encoding="utf-8") as file:
                file.writelines(lines(found))
            for logger in self._loggers:
                logger.log(found)

    def aside(self, seconds: float) -> None:
        """Leave so long out of the rates."""
        self._meter.aside(seconds)

    def text(self, t: int, name: str, text: str) -> None:
        """Give a text, such as a sample of the model after step t, to the loggers that take one."""
        for logger in self._loggers:
            if hasattr(logger, "text"):
                logger.text(t, name, text)

    def fail(self, error: BaseException) -> None:
        """Tell the loggers that the run ends by this error, or by a signal; `close` comes after."""
        for logger in self._loggers:
            if hasattr(logger, "fail"):
                logger.fail(error)

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._begun = False
            for logger in self._loggers:
                logger.close()


def _flat(values: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of nested hyper-parameters as pairs of names such as "optimizer.b1" and values."""
    found = []
    for name, value in values.items():
        found += _flat(value, f"{above}{name}.") if isinstance(value, Mapping) else [(f"{above}{name}", value)]
    return found
