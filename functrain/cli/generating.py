"""What `functrain generate` does."""

from __future__ import annotations

import sys
from pathlib import Path

import functrain as ft
from functrain.cli import bars, progress
from functrain.recipes import opened, pretrain
from functrain.recipes.continuation import continuation


def generate(
    model: Path,
    prompt: str,
    *,
    tokens: int,
    num_samples: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    tokenizer: str | None,
    device: str,
) -> None:
    """Show what the model adds to the prompt, as it comes."""
    on = pretrain.device_of(device)
    file = None if tokenizer is None else Path(tokenizer)
    with bars.bar("loading", "bytes") as loading:
        found = opened.opened(model, on, tokenizer=file, progress=loading)
    key = ft.random.key(seed, on)
    for number in range(num_samples):
        pieces = continuation(
            found.architecture,
            found.params,
            found.model,
            found.tokenizer,
            prompt,
            ft.random.fold_in(key, number) if number else key,
            tokens=tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            end=found.end,
        )
        # waited for before anything is shown: a model of NaN has nothing to show
        begin = next(pieces, "")
        if num_samples > 1:
            print("\n" * (number > 0) + f"--- {number + 1} of {num_samples} ---")
        show = progress.printable if sys.stdout.isatty() else str
        print(prompt + show(begin), end="", flush=True)
        for piece in pieces:
            print(show(piece), end="", flush=True)
        print(flush=True)
