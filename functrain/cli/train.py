"""`functrain train`: a preset, a file and options make a config, under which `training` trains."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from functrain.cli import architecture
from functrain.cli.options import UsageError, parse
from functrain.recipes import toml
from functrain.recipes.config import PRESETS, Config

DESCRIPTION = f"""Pre-train a language model on text: a GPT-2, a Llama or a BERT. PRESET is one of
{", ".join(PRESETS)}; `tiny`, a GPT-2, if it is left out.

An option wins over the file given by --config FILE.toml, which wins over the preset; RUN/config.toml holds the outcome.
The same command again goes on from the run's newest checkpoint. SIGINT (Ctrl-C), SIGTERM and SIGHUP (the terminal
closes) finish the step, save, and exit with 130, 143 and 129; where only what is shown has no reader, the run goes on.
A step whose loss or gradient is NaN is skipped and shown; a row of them, or a model that ends as NaN, exits with 1, a
wrong option with 2.

--sweep learning_rate=1e-3,3e-3 trains a lane for each value as one run; given again for other numbers of the optimizer,
a lane for each combination. RUN ends as the best lane's, and RUN/sweep has the others' records."""


@dataclass(frozen=True, kw_only=True)
class Options:
    config: Annotated[Config, tyro.conf.arg(name="")]
    run: str
    """Folder of the run."""
    accept_changes: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on with a run whose config or text was another."""
    ranks: int = 1
    """Processes on this machine that train together, each with a GPU of its own, or threads of a CPU; under torchrun
    leave it out."""
    sweep: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE,VALUE,...: a number of the optimizer and its value in each lane."""


def main(words: Sequence[str]) -> None:
    options, over = asked(words)
    if options.ranks > 1:
        from functrain.cli import launching

        raise SystemExit(launching.launch(["train", *_without(words, "--ranks")], options.ranks))
    # help and a wrong word need no torch, which takes seconds to load
    from functrain.cli import training

    training.train(options.config, over, Path(options.run), accept_changes=options.accept_changes)


def _without(words: Sequence[str], name: str) -> list[str]:
    """Return the words without an option and its value."""
    found, rest = [], iter(words)
    for word in rest:
        if word == name:
            next(rest, None)
        elif not word.startswith(f"{name}="):
            found.append(word)
    return found


def asked(words: Sequence[str]) -> tuple[Options, dict[str, list[float]]]:
    """Read what is trained and what is swept, without training.

    Raises: UsageError, and ValueError for a file that is no config.
    """
    preset, rest = ("tiny", words) if not words or words[0].startswith("-") else (words[0], words[1:])
    if preset not in PRESETS:
        close = difflib.get_close_matches(preset, PRESETS, 1)
        known = f"did you mean {close[0]}?" if close else f"there are {', '.join(PRESETS)}"
        raise UsageError(f"no preset {preset!r}; {known}")
    file, rest = _take_config_file(list(rest))
    config = PRESETS[preset] if file is None else toml.loads(_read(file), PRESETS[preset], str(file))
    config, rest = architecture.chosen(config, rest)
    options = parse(
        Options,
        rest,
        prog=f"functrain train {preset}",
        description=DESCRIPTION,
        default=Options(config=config, run=f"runs/{preset}"),
        beside=["--config", "--model.architecture"],
    )
    return options, _numbers(options)


def _numbers(options: Options) -> dict[str, list[float]]:
    """Read what is swept."""
    over: dict[str, list[float]] = {}
    if options.ranks < 1:
        raise UsageError(f"--ranks: expected at least 1 process, came {options.ranks}")
    if options.ranks > 1 and "WORLD_SIZE" in os.environ:
        raise UsageError("--ranks: torchrun has started the processes already; leave it out")
    if options.ranks > 1 and options.sweep:
        raise UsageError("--sweep: expected one process, came --ranks; leave one of them out")
    for words in options.sweep:
        name, equals, values = words.partition("=")
        try:
            numbers = [float(value) for value in values.split(",")]
        except ValueError:
            numbers = []
        if not equals or not numbers or name in over:
            raise UsageError(f"--sweep: expected NAME=NUMBER,NUMBER,... and each name once, came {words!r}")
        over[name] = numbers
    if over and options.accept_changes:
        raise UsageError("--sweep: a sweep goes on under the config it began with; leave out --accept-changes")
    return over


def _take_config_file(words: list[str]) -> tuple[Path | None, list[str]]:
    """Take `--config FILE` out: the file has to be read before the options that win over it."""
    for i, word in enumerate(words):
        if word == "--config":
            if i + 1 == len(words):
                raise UsageError("--config: expected a TOML file after it")
            return Path(words[i + 1]), words[:i] + words[i + 2 :]
        if word.startswith("--config="):
            return Path(word.removeprefix("--config=")), words[:i] + words[i + 1 :]
    return None, words


def _read(file: Path) -> str:
    if not file.is_file():
        raise UsageError(f"--config: {file}: no such file")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{file}: expected a TOML file in UTF-8") from None
