"""`functrain evaluate`: the loss of a trained model on a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from functrain.cli.options import UsageError, if_given, parse

DESCRIPTION = """Compute the loss of a model on a text: nats per token, perplexity, bits per byte; of a BERT the loss
and accuracy of masked tokens and of next sentences. The model is that of a run's newest checkpoint, or of a folder that
transformers loads; it computes in float32.

Every token but the first is predicted once, from what precedes it in its window of the model's context; a BERT is
asked once about each pair of an epoch. Ctrl-C shows the loss of what was evaluated until then, and exits with 130."""


@dataclass(frozen=True, kw_only=True)
class Options:
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN|FOLDER")]
    """A run's folder, one of its checkpoints, or a model's folder."""
    data: Annotated[str | None, if_given("FILE|FOLDER")] = None
    """A file or folder of UTF-8 text, JSON lines (.jsonl) with a field "text", or a token file (.bin) of the model's
    tokenizer. The validation text of the run if it is left out."""
    batch: int = 16
    """Windows, or pairs of a BERT, that are computed at once."""
    tokenizer: Annotated[str | None, if_given("FILE")] = None
    """The tokenizer's file, where it is not beside the model."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""


def main(words: Sequence[str]) -> None:
    options = parse(Options, words, prog="functrain evaluate", description=DESCRIPTION)
    if options.batch < 1:
        raise UsageError(f"--batch: expected at least 1, came {options.batch}")
    # help and a wrong option need no torch, which takes seconds to load
    from functrain.cli import evaluating

    evaluating.evaluate(
        Path(options.model), options.data, batch=options.batch, tokenizer=options.tokenizer, device=options.device
    )
