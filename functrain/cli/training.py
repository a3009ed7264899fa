"""A run of `functrain train`: the recipe trains; a sample of text and a picture end it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import functrain as ft
from functrain.cli import bars, plotting, progress
from functrain.cli.options import UsageError
from functrain.recipes import architectures, folder, pretrain, ranks, sweep
from functrain.recipes.config import Config
from functrain.recipes.continuation import continuation
from functrain.sharding.pieces import is_split
from functrain.train.watching.display import Display


def train(config: Config, over: Mapping[str, Sequence[float]], run: Path, *, accept_changes: bool) -> None:
    """Train as `config` says in the folder `run`, a lane for each combination of the numbers in `over`, and show it.

    Raises: UsageError for what cannot be swept, and what the recipe raises.
    """
    if over and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("--sweep: expected one process, came several ranks; sweep without torchrun and --ranks")
    if over:
        try:
            sweep.check(over)
        except ValueError as error:
            raise UsageError(f"--{error}") from error
    show: Display = progress.show() if os.environ.get("RANK", "0") == "0" else ranks.Quiet()
    try:
        if over:
            config, result = sweep.main(config, over, run, show, bar=bars.bar)
        else:
            result = pretrain.main(config, run, show, accept_changes=accept_changes, bar=bars.bar)
        pretrain.check_finite(result)
    except ArithmeticError:
        drawn = [run] if (run / "metrics.jsonl").is_file() else sorted(run.glob("sweep/lane-*"))
        show.note(f"learning curve: {plotting.draw(drawn, run / 'loss.png')}")
        raise
    finally:
        show.end()
    if not result.leads:
        return
    architecture = architectures.of(config.model)
    show.note(f"\n{architecture.objective.closing(result.validation, result.texts)}")
    more = ""
    if architecture.generates and not any(map(is_split, ft.tree.leaves(result.state.params))):
        tokenizer, key = result.texts.tokenizer, ft.random.key(config.seed, result.state.key.device)
        model = pretrain.model_of(config, tokenizer.vocab_size)
        text = "".join(continuation(architecture, result.state.params, model, tokenizer, "", key, tokens=300))
        folder.write(run / "sample.txt", text + "\n")
        show.note(f"\na sample:\n\n{progress.printable(text)}\n")
        more = f"   more text: functrain generate {run} --prompt 'def '"
    show.note(f"learning curve: {plotting.draw([run], run / 'loss.png')}{more}")
