"""`functrain evaluate`: the loss of a trained model on a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

import functrain as ft
from functrain.cli import bars
from functrain.cli.options import UsageError, parse
from functrain.recipes import evaluation, opened, pretrain

DESCRIPTION = """Compute the loss of a model on a text: nats per token, perplexity, bits per byte. The model is that of
a run's newest checkpoint, or of a folder that transformers loads; it computes in float32.

Every token but the first is predicted once, from what precedes it in its window of the model's context. Ctrl-C shows
the loss of what was evaluated until then, and exits with 130."""


@dataclass(frozen=True, kw_only=True)
class Options:
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN|FOLDER")]
    """A run's folder, one of its checkpoints, or a model's folder."""
    data: str | None = None
    """A file or folder of UTF-8 text, JSON lines (.jsonl) with a field "text", or a token file (.bin) of the model's
    tokenizer. The validation text of the run if it is left out."""
    batch: int = 16
    """Windows that are computed at once."""
    tokenizer: str | None = None
    """The tokenizer's file, where it is not beside the model."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""


def main(words: Sequence[str]) -> None:
    options = parse(Options, words, prog="functrain evaluate", description=DESCRIPTION)
    if options.batch < 1:
        raise UsageError(f"--batch: expected at least 1, came {options.batch}")
    device = pretrain.device_of(options.device)
    file = None if options.tokenizer is None else Path(options.tokenizer)
    with bars.bar("loading", "bytes") as loading:
        found = opened.opened(Path(options.model), device, tokenizer=file, progress=loading)
    found = found._replace(params=ft.tree.cast(found.params, torch.float32))
    with bars.bar("encoding", "characters") as encoding:
        name, tokens = evaluation.text_of(options.data, found, progress=encoding)
    try:
        with bars.bar("evaluating", "batches") as evaluating:
            result = evaluation.evaluate(found, tokens, batch=options.batch, progress=evaluating)
    except evaluation.Stopped as stopped:
        if stopped.evaluation is not None:
            print(f"{found.found} on the first {stopped.done:,} of {stopped.batches:,} batches of {name}")
            _show(stopped.evaluation, tokens)
        raise
    print(f"{found.found} on {name}")
    _show(result, tokens)
    if not math.isfinite(result.loss):
        raise pretrain.NotFinite(f"{found.found}: the loss is {result.loss}; a parameter or a logit is not finite")


def _show(result: evaluation.Evaluation, tokens: ft.data.Tokens) -> None:
    print(f"{result.tokens:,} tokens predicted, of {tokens.bytes_per_token:.2f} bytes each")
    print(f"loss           {result.loss:.4f} nats per token")
    print(f"perplexity     {result.perplexity:.6g}")
    print(f"bits per byte  {result.bits_per_byte:.4f}")
