"""What a recipe records beside the public record: bits per byte, and what a person is told of steps that went wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

import functrain as ft
from functrain.recipes.config import Config
from functrain.recipes.model_config import Bert
from functrain.train.watching import Record
from functrain.train.watching import Row as Row
from functrain.train.watching import rows as rows
from functrain.train.watching.display import Display
from functrain.train.watching.rows import readable as readable

Show: TypeAlias = Display


def record_of(
    run: Path,
    *,
    every: int,
    learning_rate: Callable[[Any], Any],
    show: Show,
    counted: Mapping[str, Any],
    utilization: Mapping[str, Any] | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
) -> Record:
    """Return the record of a run, TensorBoard events included, whose last row of each reading is shown.

    `counted` says what of a step is counted a second, as `ft.train.record` is told it: samples, tokens; `utilization`
    is its flops and those of the device, where they are known.
    """
    loggers: list[ft.train.watching.Logger] = [_Shown(show)]
    try:
        str(run).encode("utf-8")
    except UnicodeEncodeError:
        show.note("no TensorBoard events: it takes no folder whose name is not UTF-8")
    else:
        loggers.insert(0, ft.train.watching.tensorboard(run / "tensorboard"))
    return ft.train.record(
        run,
        every=every,
        learning_rate=learning_rate,
        **counted,
        **utilization or {},
        loggers=loggers,
        hyperparameters=hyperparameters,
    )


def utilization(config: Config, model: Any, device: torch.device, ranks: int = 1) -> dict[str, float]:
    """Return what `ft.train.record` is told for the model-FLOPs utilisation: nothing where the device's rate is not
    known. All cells of a batch count, those of padding too, and the rates of all ranks."""
    peak: float | None
    if config.peak_flops == "auto":
        peak = ft.train.watching.peak_flops(device, getattr(torch, config.precision))
    else:
        peak = config.peak_flops
    if peak is None:
        return {}
    most = config.model.max_predictions if isinstance(config.model, Bert) else "all"
    flops = ft.models.training_flops_of(model, predictions=None if most == "all" else most)
    return {"flops": config.batch * config.model.context * flops, "peak_flops": peak * ranks}


def bits(bits_per_byte: float) -> Callable[[int, Any, dict[str, Any]], dict[str, torch.Tensor]]:
    """Return a hook that adds the bits per byte of the next tokens, of which a nat per token is so many.

    A loss that more is added to says theirs as "next_token_loss".
    """

    def hook(t: int, state: Any, metrics: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {"bits_per_byte": metrics.get("next_token_loss", metrics["loss"]).double() * bits_per_byte}

    vars(hook)["measures"] = True
    return hook


class _Shown:
    """A logger that shows the last row, and a step that is not finite, or that a guard skipped, by itself."""

    def __init__(self, show: Show) -> None:
        self._show = show
        self._bad_in_row = 0

    def begin(self, step: int) -> None:
        self._bad_in_row = 0

    def log(self, rows: Sequence[Row]) -> None:
        self._show.row(rows[-1])
        for row in rows:
            finite = math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
            if finite and not row.get("skipped"):
                self._bad_in_row = 0
                continue
            what = f"step {int(row['step'])}: loss {row['loss']:.6g}, gradient norm {row['grad_norm']:.6g}"
            if _is_overflow(row):
                self._show.note(f"{what}: skipped, and the loss scale of {row['loss_scale']:g} made smaller")
                continue
            self._bad_in_row += 1
            done = "skipped" if row.get("skipped") else "not finite"
            self._show.note(f"{what}: {done} ({self._bad_in_row} in a row)")

    def close(self) -> None: ...


def _is_overflow(row: Row) -> bool:
    """Tell whether a step was skipped for what a smaller loss scale mends, as no guard counts it."""
    large = row.get("loss_scale", 0.0) > 1.0 and math.isfinite(row["loss"]) and not math.isfinite(row["grad_norm"])
    return bool(row.get("skipped")) and large
