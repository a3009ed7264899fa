"""`functrain generate`: a run's model continues a prompt."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

import functrain as ft
from functrain.cli import progress
from functrain.cli.options import UsageError, parse
from functrain.recipes import folder, pretrain
from functrain.recipes.continuation import continuation


@dataclass(frozen=True, kw_only=True)
class Options:
    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    prompt: str = ""
    """Text to continue; the start of a document if it is left out."""
    tokens: int = 200
    """Tokens to add, unless the document ends before."""
    temperature: float = 0.8
    """0 takes the likeliest token each time."""
    top_k: int | None = None
    """Draw among that many likeliest tokens."""
    top_p: float | None = None
    """Draw among the likeliest tokens that together have this probability."""
    seed: int = 0
    """Another seed, another text."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""


def main(words: Sequence[str]) -> None:
    options = parse(Options, words, prog="functrain generate", description=__doc__ or "")
    if options.temperature == 0 and (options.top_k, options.top_p) != (None, None):
        raise UsageError("generate: --top-k and --top-p choose what to draw from, and temperature 0 draws nothing")
    if any("\ud800" <= c <= "\udfff" for c in options.prompt):
        raise UsageError("generate: --prompt: expected UTF-8, came other bytes")
    if options.tokens < 0:
        raise UsageError(f"generate: --tokens: expected at least 0, came {options.tokens}")
    run = Path(options.run)
    newest = folder.newest(run)
    tokenizer = ft.data.load_tokenizer(run / "tokenizer.json")
    device = pretrain.device_of(options.device)
    params = ft.tree.map(lambda p: p.to(device), ft.checkpoint.load(newest, at="params"))
    text = continuation(
        params,
        pretrain.model_at(run, newest, tokenizer),
        tokenizer,
        options.prompt,
        ft.random.key(options.seed, device),
        tokens=options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
    )
    print(options.prompt + (progress.printable(text) if sys.stdout.isatty() else text))
