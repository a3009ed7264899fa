"""The best checkpoint of a run, by a metric of the step that it was saved after."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from functrain.checkpoint import run as runs
from functrain.checkpoint.errors import MissingError
from functrain.checkpoint.retention import Best, Known
from functrain.checkpoint.run import Run

_log = logging.getLogger(__name__)


def best(run: Run, metric: str | None = None, mode: Literal["min", "max"] | None = None) -> Path:
    """Return the run's best checkpoint: `load(best(run), like=state)` restores it.

    The metric, and whether the lowest or the highest is best, are those of `every(..., keep_best=Best(metric))` unless
    they are given. Of equal values the newer is better; not finite is never best. One that does not verify is passed
    over with a message through `logging`.

    Raises: MissingError where no checkpoint of the run has the metric and verifies, naming the metrics that there are.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as run:
    ...     save = ft.checkpoint.every(100, run, keep_best=ft.checkpoint.Best("validation_loss"))
    ...     for t, loss in [(100, 0.5), (200, 0.25), (300, 0.75)]:  # as ft.fit does with every=[save]
    ...         save(t, {"w": torch.zeros(2)}, {"validation_loss": loss})
    ...     ft.checkpoint.best(run).name
    'step-00000200'
    """
    known, found = Known(), dict[Path, Mapping[str, Any]]()
    for path in reversed(runs.list(run)):
        facts = known.facts(path)
        if facts is None or not facts.metrics:
            continue
        found[path] = facts.metrics
        if metric is None:
            metric = facts.keep_best.get("metric")
        if mode is None and facts.keep_best.get("metric") == metric:
            mode = facts.keep_best.get("mode")
    sign = -1 if mode == "max" else 1
    ranked = []
    for path, metrics in found.items():
        value = _number(metrics.get(metric or ""))
        if value is not None:
            ranked.append((sign * value, -runs.step_of(path), path))
    for *_, path in sorted(ranked):
        if (fault := runs.fault(path)) is None:
            return path
        _log.warning("passed over a checkpoint: %s", fault)
    names = sorted({name for metrics in found.values() for name in metrics})
    raise MissingError(
        Path(run) / "checkpoints",
        expected=f"a checkpoint with the metric {metric!r}" if metric else "a checkpoint with a metric",
        came=f"only {', '.join(names)}" if names else "none",
        way_out="save with checkpoint.every(n, run, keep_best=Best(metric)), where some hook gives the metric",
    )


class Ranks:
    """The values by which a run has saved what was best so far, on the disk or since."""

    def __init__(self, root: Path, rule: Best) -> None:
        self._root, self._rule = root, rule
        self._values: dict[int, float] | None = None
        self._came = False
        self._others: list[str] = []

    def admits(self, t: int, metrics: Mapping[str, Any] | None, name: str) -> bool:
        """Tell whether step t of the run of that name is among the best so far. Reads the metric where it is there."""
        if not metrics:
            return False
        value = self._rule.value(metrics)
        if value is None:
            self._others = list(map(str, metrics))
            return False
        self._came = True
        if not math.isfinite(value):
            return False
        sign = -1 if self._rule.mode == "max" else 1
        ranked = sorted(sign * v for step, v in self._of_run(name).items() if step < t)[: self._rule.count]
        return len(ranked) < self._rule.count or sign * value <= ranked[-1]

    def add(self, t: int, metrics: Mapping[str, Any] | None, name: str) -> None:
        value = self._rule.value(metrics) if metrics else None
        if value is not None and math.isfinite(value):
            self._of_run(name)[t] = value

    def forget(self) -> None:
        """Read the values again from the disk: the run went back."""
        self._values = None

    def check_came(self, name: str) -> None:
        """Raise a ValueError where steps had metrics, and none this one."""
        if self._others and not self._came and not self._of_run(name):
            raise ValueError(
                f"keep_best: expected a metric {self._rule.metric!r} in some step, came only "
                f"{', '.join(self._others)}; name one of these, or give fit a hook that measures it, as "
                "ft.train.every(n, ft.train.validate(loss_fn, batches))"
            )

    def _of_run(self, name: str) -> dict[int, float]:
        if self._values is None:
            self._values, known = {}, Known()
            for path in runs.list(self._root):
                facts = known.facts(path)
                value = None if facts is None or facts.run != name else _number(facts.metrics.get(self._rule.metric))
                if value is not None and known.is_whole(path):
                    self._values[runs.step_of(path)] = value
        return self._values


def _number(value: Any) -> float | None:
    # what is not finite stands there as text
    return value if isinstance(value, float) and math.isfinite(value) else None
