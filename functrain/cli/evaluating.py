"""What `functrain evaluate` does."""

from __future__ import annotations

import math
from pathlib import Path

import torch

import functrain as ft
from functrain.cli import bars
from functrain.recipes import evaluation, opened, pretrain


def evaluate(model: Path, data: str | None, *, batch: int, tokenizer: str | None, device: str) -> None:
    """Show the loss of a model on a text.

    Raises: pretrain.NotFinite for a loss that is not finite.
    """
    on = pretrain.device_of(device)
    file = None if tokenizer is None else Path(tokenizer)
    with bars.bar("loading", "bytes") as loading:
        found = opened.opened(model, on, tokenizer=file, progress=loading)
    found = found._replace(params=ft.tree.cast(found.params, torch.float32))
    with bars.bar("encoding", "characters") as encoding:
        name, text = evaluation.text_of(data, found, progress=encoding)
    try:
        with bars.bar("evaluating", "batches") as evaluating:
            result = evaluation.evaluate(found, text, batch=batch, progress=evaluating)
    except evaluation.Stopped as stopped:
        if stopped.evaluation is not None:
            print(f"{found.found} on the first {stopped.done:,} of {stopped.batches:,} batches of {name}")
            _show(found, text, stopped.evaluation)
        raise
    print(f"{found.found} on {name}")
    _show(found, text, result)
    loss = result.metrics["loss"]
    if not math.isfinite(loss):
        raise pretrain.NotFinite(f"{found.found}: the loss is {loss}; a parameter or a logit is not finite")


def _show(found: opened.Opened, text: evaluation.Text, result: evaluation.Evaluation) -> None:
    for line in found.architecture.objective.lines(result.metrics, text, result.done):
        print(line)
