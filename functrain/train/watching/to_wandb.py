"""Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from functrain.train.watching.rows import Row


def wandb(run: Any = None, **options: Any) -> WandB:
    """Return a logger to Weights & Biases: into `run`, or one that `wandb.init(**options)` makes when training begins.

    A run that was made here is finished at the end, with exit code 1, failed, after an error, and 255, killed, where a
    signal or Ctrl-C has stopped it. For a run that goes on, give `id=` and `resume="allow"`. Charts are over "step",
    which each row has, as W&B's own count only grows: after going back, the points of both are there. Needs the package
    wandb.

    Raises: ImportError, with the command to install it; ValueError for a run and options.

    >>> logger = ft.train.watching.wandb(project="digits", name="mine")
    >>> hook = ft.train.record("runs/mine", loggers=[logger], hyperparameters={"learning_rate": 1e-3})  # for ft.fit
    """
    try:
        import wandb as _  # noqa: F401
    except ImportError as error:
        raise ImportError("wandb is not installed; pip install functrain[wandb]") from error
    if run is not None and options:
        raise ValueError(f"wandb: expected a run, or options for wandb.init, came both: {', '.join(options)}")
    return WandB(run, options)


class WandB:
    """The logger that `wandb` returns."""

    def __init__(self, run: Any, options: dict[str, Any]) -> None:
        self._run, self._ours, self._options = run, run is None, options
        self._exit_code = 0

    def begin(self, step: int) -> None:
        if self._run is None:
            import wandb

            self._run = wandb.init(**self._options)
        self._run.define_metric("*", step_metric="step")

    def log(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._run.log(row)

    def hyperparameters(self, values: Mapping[str, Any]) -> None:
        self._run.config.update(dict(values), allow_val_change=True)

    def text(self, step: int, name: str, text: str) -> None:
        import wandb

        self._run.log({"step": step, name: wandb.Table(columns=["step", "text"], data=[[step, text]])})

    def fail(self, error: BaseException) -> None:
        self._exit_code = 1 if isinstance(error, Exception) else 255  # as W&B's own of Ctrl-C

    def close(self) -> None:
        if self._ours and self._run is not None:
            self._run.finish(exit_code=self._exit_code)
            self._run, self._exit_code = None, 0
