"""MLflow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from functrain.train.watching.rows import Row


def mlflow(run_id: str | None = None, **options: Any) -> MLflow:
    """Return a logger to MLflow's tracking server: into the run of that id, or a new one that
    `MlflowClient.create_run(**options)` makes when training begins, in experiment "0" if no `experiment_id` says more.

    The run's status is RUNNING until the end, then FINISHED, FAILED after an error, and KILLED where a signal or Ctrl-C
    has stopped it. Points have the wall time of their steps. A point that is not finite is left out, as not every store
    takes one. After going back, the points of both are there. Needs the package mlflow, or mlflow-skinny.

    Raises: ImportError, with the command to install it; ValueError for an id and options.

    >>> logger = ft.train.watching.mlflow(experiment_id="0", run_name="mine")
    >>> hook = ft.train.record("runs/mine", loggers=[logger], hyperparameters={"learning_rate": 1e-3})  # for ft.fit
    """
    try:
        import mlflow as _  # noqa: F401
    except ImportError as error:
        raise ImportError("mlflow is not installed; pip install functrain[mlflow]") from error
    if run_id is not None and options:
        raise ValueError(f"mlflow: expected a run_id, or options for create_run, came both: {', '.join(options)}")
    return MLflow(run_id, options)


class MLflow:
    """The logger that `mlflow` returns; `run_id` is that of its run."""

    def __init__(self, run_id: str | None, options: dict[str, Any]) -> None:
        self.run_id, self._options = run_id, options
        self._client: Any = None
        self._status = "FINISHED"

    def begin(self, step: int) -> None:
        self._status = "FINISHED"
        if self._client is None:
            from mlflow import MlflowClient

            self._client = MlflowClient()
        if self.run_id is None:
            self.run_id = self._client.create_run(**{"experiment_id": "0", **self._options}).info.run_id
        else:  # one that goes on was ended before
            self._client.update_run(self.run_id, status="RUNNING")

    def log(self, rows: Sequence[Row]) -> None:
        from mlflow.entities import Metric

        points = [
            Metric(name, value, int(row.get("time", 0.0) * 1000), int(row["step"]))
            for row in rows
            for name, value in row.items()
            if name not in ("step", "time") and math.isfinite(value)
        ]
        for start in range(0, len(points), 1000):  # no more are taken at once
            self._client.log_batch(self.run_id, metrics=points[start : start + 1000])

    def hyperparameters(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        self._client.log_batch(self.run_id, params=[Param(name, str(value)) for name, value in values.items()])

    def text(self, step: int, name: str, text: str) -> None:
        self._client.log_text(self.run_id, text, f"{name}/step-{step:08d}.txt")

    def fail(self, error: BaseException) -> None:
        self._status = "FAILED" if isinstance(error, Exception) else "KILLED"

    def close(self) -> None:
        if self._client is not None and self.run_id is not None:
            self._client.set_terminated(self.run_id, status=self._status)
