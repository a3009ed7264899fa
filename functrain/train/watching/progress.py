"""The progress bar of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from functrain.train.hooks import Metrics
from functrain.train.watching.display import Display, display
from functrain.train.watching.meter import Meter


def progress(
    *,
    every: int = 10,
    learning_rate: Callable[[Any], Any] | None = None,
    steps_per_epoch: float | None = None,
    samples: int | str | None = None,
    tokens: int | str | None = None,
    metrics: Sequence[str] | None = None,
    to: Display | None = None,
) -> Progress:
    """Return a hook for `fit` that shows how far the run is: a live bar with the time left in a terminal, else a line
    every `every` steps.

    The bar needs rich, `pip install functrain[watching]`, and without it there are lines. The numbers are those of
    `ft.train.record`; of the step's metrics, `metrics` alone are shown where it is given. Numbers are read every
    `every` steps, which waits for the device. `evaluating(done, of)` shows an evaluation, for
    `ft.train.validate(..., progress=bar.evaluating)`; `note(text)` is a line above the bar. `to` is a display of one's
    own.

    In a loop of one's own: `bar.begin(t, steps, state)`, `bar(t, state, metrics)` after step t, `bar.close()`.

    Raises: what `ft.train.record` raises.

    >>> bar = ft.train.progress()  # ft.fit(step, state, batches, steps=100, every=[bar]) makes these calls
    >>> bar.begin(0, 100, None)
    >>> bar(1, None, {"loss": 0.5, "accuracy": 0.75})
    step 1/100  loss 0.5000  accuracy 0.75  ETA -
    >>> bar.close()
    """
    meter = Meter(
        "progress", every=every, learning_rate=learning_rate, steps_per_epoch=steps_per_epoch, samples=samples,
        tokens=tokens, flops=None, peak_flops=None,
    )  # fmt: skip
    return Progress(display(metrics) if to is None else to, meter)


class Progress:
    """The hook that `progress` returns."""

    def __init__(self, to: Display, meter: Meter) -> None:
        self._to, self._meter = to, meter
        self._begun = False

    def begin(self, t: int, steps: int, state: Any) -> None:
        self._meter.read()  # of steps that the run went back before
        self._meter.begin(t, 0.0)
        self._to.begin(t, steps)
        self._begun = True

    def __call__(self, t: int, state: Any, metrics: Metrics) -> None:
        if not self._begun:
            raise ValueError("progress: expected progress.begin(t, steps, state) before the first step of a loop")
        # what was measured is shown when it is there, not when a multiple of `every` comes
        if self._meter.add(t, state, metrics) or any(name.startswith("validation_") for name in metrics):
            self._show()

    def evaluating(self, done: int, of: int | None) -> None:
        self._to.evaluating(done, of)

    def note(self, text: str) -> None:
        self._to.note(text)

    def aside(self, seconds: float) -> None:
        self._meter.aside(seconds)

    def close(self) -> None:
        if self._begun:
            try:
                self._show()
            finally:
                self._to.end()
                self._begun = False

    def _show(self) -> None:
        rows = self._meter.read()
        if rows:
            self._to.row(rows[-1])
