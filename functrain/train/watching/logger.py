"""What a logger is: TensorBoard, a CSV file, Weights & Biases, MLflow, or one of your own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from functrain.train.watching.rows import Row


class Logger(Protocol):
    """Where `ft.train.record` brings its rows, beside metrics.jsonl.

    Optional methods: `hyperparameters(values)`, a flat dict, once when the run begins or goes on; `text(step, name,
    text)`, a sample of what a model writes; and `fail(error)`, before `close`, where the run ends by an error, or by a
    signal or Ctrl-C, which are no `Exception`.
    """

    def begin(self, step: int, /) -> None:
        """Go on after this step: rows of later ones that are there already do not count."""

    def log(self, rows: Sequence[Row], /) -> None:
        """Take the rows of steps that follow one another, one for each."""

    def close(self) -> None: ...
