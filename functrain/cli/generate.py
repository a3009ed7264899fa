"""`functrain generate`: a model continues a prompt, and its text is shown as it comes."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from functrain.cli.options import UsageError, if_given, parse

DESCRIPTION = """Let a model continue a prompt: that of a run's newest checkpoint, or of a folder that transformers
loads, as `functrain export` writes it. The text is shown as it comes, up to the end of the document.

`-` as the prompt reads standard input, and so does a pipe without --prompt; the line break at its end is left out."""


@dataclass(frozen=True, kw_only=True)
class Options:
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN|FOLDER")]
    """A run's folder, one of its checkpoints, or a model's folder."""
    prompt: Annotated[str | None, if_given("TEXT")] = None
    """Text to continue; "-": standard input. The start of a document if it is left out and nothing is piped in."""
    tokens: int = 200
    """Tokens to add, unless the document ends before."""
    num_samples: int = 1
    """Texts to make, one after another. The first is the same for any number."""
    temperature: float = 0.8
    """0 takes the likeliest token each time."""
    top_k: Annotated[int | None, if_given("INT")] = None
    """Draw among that many likeliest tokens."""
    top_p: Annotated[float | None, if_given("FLOAT")] = None
    """Draw among the likeliest tokens that together have this probability."""
    seed: int = 0
    """Another seed, another text."""
    tokenizer: Annotated[str | None, if_given("FILE")] = None
    """The tokenizer's file, where it is not beside the model."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""


def main(words: Sequence[str]) -> None:
    options = parse(Options, words, prog="functrain generate", description=DESCRIPTION)
    if options.temperature == 0 and (options.top_k, options.top_p) != (None, None):
        raise UsageError("generate: --top-k and --top-p choose what to draw from, and temperature 0 draws nothing")
    if options.temperature == 0 and options.num_samples > 1:
        raise UsageError(
            "generate: at temperature 0 all of --num-samples would be the same text; leave one of them out"
        )
    for name, value, least in (("tokens", options.tokens, 0), ("num-samples", options.num_samples, 1)):
        if value < least:
            raise UsageError(f"generate: --{name}: expected at least {least}, came {value}")
    prompt = _prompt(options.prompt)
    # help and a wrong option need no torch, which takes seconds to load
    from functrain.cli import generating

    generating.generate(
        Path(options.model),
        prompt,
        tokens=options.tokens,
        num_samples=options.num_samples,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        tokenizer=options.tokenizer,
        device=options.device,
    )


def _prompt(said: str | None) -> str:
    """Return the prompt that was given, or what standard input holds."""
    if said is None and not _is_piped():
        return ""
    if said is None or said == "-":
        try:
            return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError:
            raise UsageError("generate: standard input: expected a prompt in UTF-8, came other bytes") from None
    if any("\ud800" <= c <= "\udfff" for c in said):
        raise UsageError("generate: --prompt: expected UTF-8, came other bytes")
    return said


def _is_piped() -> bool:
    """Tell whether standard input is a pipe or a file; a terminal or /dev/null would have nothing to say."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
