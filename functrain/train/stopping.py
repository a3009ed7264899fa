"""Early stopping: a run ends when a metric, such as the validation loss, has not improved for a while."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Literal

from functrain.data.atomic import replacing
from functrain.train.hooks import Metrics, Stop
from functrain.train.state import TrainState


def early_stopping(
    metric: str,
    *,
    patience: int,
    min_delta: float = 0.0,
    mode: Literal["min", "max"] = "min",
    run: str | os.PathLike[str] | None = None,
) -> EarlyStopping:
    """Return a hook for `fit` that stops the run once `patience` measurements in a row were no better than the best.

    It looks only at steps whose metrics have this one: with `ft.train.every(100, ft.train.validate(...))`, a patience
    of 3 is 300 steps. Better is lower than the best by more than `min_delta`, or with mode "max" higher; what is not
    finite is never better. Equals the rule of Keras' `EarlyStopping`. The step of the best is found by
    `ft.checkpoint.best(run)`, where `ft.checkpoint.every(..., keep_best=ft.checkpoint.Best(metric))` saves.

    With `run`, the run's folder, what it has seen is kept in RUN/early_stopping.json: a run that was killed and is
    started again stops at the step where it would have, and one that was stopped stays stopped. Without, a run that is
    started again begins to count anew.

    Raises: ValueError for numbers that cannot be; from `fit`, ValueError for a metric of several numbers, and at its
    end where the metric never came, naming those that did.

    >>> hook = ft.train.early_stopping("validation_loss", patience=2)  # for ft.fit, behind ft.train.validate
    >>> for t, loss in enumerate([1.0, 0.5, 0.7, 0.6], 1):
    ...     stop = hook(t, None, {"validation_loss": loss})
    >>> stop.reason
    'validation_loss has not improved in 2 measurements; the best was 0.5 at step 2'
    """
    if type(patience) is not int or patience < 1:
        raise ValueError(
            f"early_stopping: expected a patience of at least 1 measurement, came {patience!r}; 1 stops at the first "
            "that is no better"
        )
    if not 0.0 <= min_delta < math.inf:
        raise ValueError(f"early_stopping: expected min_delta of at least 0, came {min_delta!r}")
    if mode not in ("min", "max"):
        raise ValueError(f"early_stopping: expected mode 'min' or 'max', came {mode!r}")
    file = None if run is None else Path(run) / "early_stopping.json"
    return EarlyStopping(metric, patience, min_delta, mode, file)


class EarlyStopping:
    """The hook that `early_stopping` returns; `best` and `best_step` tell what it has seen."""

    def __init__(self, metric: str, patience: int, min_delta: float, mode: str, file: Path | None) -> None:
        self._metric, self._patience, self._min_delta, self._mode = metric, patience, min_delta, mode
        self._file = file
        self._seen: list[tuple[int, float]] = []  # steps that had the metric, and its values
        self._others: list[str] = []

    @property
    def best(self) -> float | None:
        return self._judged()[0]

    @property
    def best_step(self) -> int | None:
        return self._judged()[1]

    def begin(self, t: int, steps: int, state: TrainState) -> Stop | None:
        if self._file is not None and self._file.exists():
            self._seen = _read(self._file).get(self._metric, [])
        self._seen = [row for row in self._seen if row[0] <= t]
        return self._stop()

    def __call__(self, t: int, state: TrainState, metrics: Metrics) -> Stop | None:
        if self._metric not in metrics:
            self._others = list(metrics)
            return None
        shape = tuple(getattr(metrics[self._metric], "shape", ()))
        if math.prod(shape) != 1:
            raise ValueError(
                f"early_stopping: {self._metric}: expected one number, came a tensor {shape}, as the lanes of a sweep "
                "have; let a hook of your own measure the best lane"
            )
        self._seen.append((t, float(metrics[self._metric])))
        if self._file is not None:
            # before a checkpoint of this step is: hooks that save come after all others
            _write(self._file, self._metric, self._seen)
        return self._stop()

    def end(self, t: int) -> None:
        """Raise a ValueError where the metric never came."""
        if self._others and not self._seen:
            raise ValueError(
                f"early_stopping: expected a metric {self._metric!r} in some step, came only "
                f"{', '.join(self._others)}; name one of these, or give fit a hook that measures it, as "
                "ft.train.every(n, ft.train.validate(loss_fn, batches))"
            )

    def _stop(self) -> Stop | None:
        best, step, since = self._judged()
        if since < self._patience:
            return None
        return Stop(
            f"{self._metric} has not improved in {since} measurements"
            + ("" if best is None else f"; the best was {best:.6g} at step {step}")
        )

    def _judged(self) -> tuple[float | None, int | None, int]:
        """Return the best, its step, and how many measurements were made since."""
        best, step, since = None, None, 0
        sign = 1 if self._mode == "min" else -1
        for t, value in self._seen:
            if math.isfinite(value) and (best is None or sign * value + self._min_delta < sign * best):
                best, step, since = value, t, 0
            else:
                since += 1
        return best, step, since


def _read(file: Path) -> dict[str, list[tuple[int, float]]]:
    try:
        table = json.loads(file.read_bytes())
        # what is not finite stands there as text
        return {metric: [(int(t), float(value)) for t, value in rows] for metric, rows in table.items()}
    except (ValueError, TypeError, AttributeError):
        raise ValueError(
            f"{file}: expected what early_stopping has seen, and it is damaged; remove it to count anew"
        ) from None


def _write(file: Path, metric: str, seen: list[tuple[int, float]]) -> None:
    table = (_read(file) if file.exists() else {}) | {metric: seen}
    readable = {name: [[t, v if math.isfinite(v) else str(v)] for t, v in rows] for name, rows in table.items()}
    with replacing(file) as out:
        out.write(json.dumps(readable).encode() + b"\n")
