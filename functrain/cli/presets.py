"""`functrain presets`: what `functrain train` knows by name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from functrain.cli.options import UsageError, if_given, parse
from functrain.recipes import toml
from functrain.recipes.config import PRESETS, Config

DESCRIPTION = """List the presets of `functrain train`: their models, their texts, and what they need. With a preset's
name, its config is printed, for `functrain presets NAME > FILE.toml` and `functrain train --config FILE.toml`."""

_NEEDS = {
    "tiny": "2 CPU cores, under 4 minutes",
    "smoke": "any CPU, seconds: to try things out, it learns nothing",
    "gpt2-124m": "a GPU, and days of it; not measured yet",
    "llama-tiny": "a CPU, minutes; not measured yet",
    "llama-smoke": "any CPU, seconds: to try things out, it learns nothing",
    "llama-1b": "GPUs, and weeks of them; not measured",
    "bert-tiny": "2 CPU cores, under 8 minutes",
    "bert-smoke": "any CPU, seconds: to try things out, it learns nothing",
    "bert-base": "a GPU, and weeks of it; not measured",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    name: Annotated[tyro.conf.Positional[str | None], if_given("[PRESET]")] = None
    """The preset whose config is printed."""


def main(words: Sequence[str]) -> None:
    options = parse(Options, words, prog="functrain presets", description=DESCRIPTION)
    if options.name is None:
        print("\n\n".join(_described(name, config) for name, config in PRESETS.items()))
    elif options.name in PRESETS:
        print(f"# the preset {options.name}\n{toml.dumps(PRESETS[options.name])}", end="")
    else:
        close = difflib.get_close_matches(options.name, PRESETS, 1)
        meant = f"did you mean {close[0]}?" if close else f"there are {', '.join(PRESETS)}"
        raise UsageError(f"no preset {options.name!r}; {meant}")


def _described(name: str, config: Config) -> str:
    shape, per_step = config.model, config.batch * config.model.context
    size = shape.parameters(config.data.vocabulary)  # of a small text there may be fewer tokens
    return "\n".join(
        [
            name,
            f"  model     {shape.architecture} of {_counted(size)} parameters: {shape.layers} layers, "
            f"{shape.heads} heads, width {shape.width}",
            f"  text      {config.data.corpus}, {config.data.vocabulary:,} tokens, context {shape.context}",
            f"  training  {config.steps:,} steps of {per_step:,} tokens: {_counted(config.steps * per_step)}",
            f"  needs     {_NEEDS[name]}",
        ]
    )


def _counted(number: int) -> str:
    for size, name in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return str(number)
