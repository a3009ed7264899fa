"""A run of `functrain train`: the recipe trains; a sample of text and a picture end it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import functrain as ft
from functrain.cli import bars, plotting, progress
from functrain.cli.options import UsageError
from functrain.recipes import architectures, folder, pretrain, sweep
from functrain.recipes.config import Config
from functrain.recipes.continuation import continuation


def train(config: Config, over: Mapping[str, Sequence[float]], run: Path, *, accept_changes: bool) -> None:
    """Train as `config` says in the folder `run`, a lane for each combination of the numbers in `over`, and show it.

    Raises: UsageError for what cannot be swept, and what the recipe raises.
    """
    if over:
        try:
            sweep.check(over)
        except ValueError as error:
            raise UsageError(f"--{error}") from error
    show = progress.show()
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
    architecture = architectures.of(config.model)
    show.note(f"\n{architecture.objective.closing(result.validation, result.texts)}")
    more = ""
    if architecture.generates:
        tokenizer, key = result.texts.tokenizer, ft.random.key(config.seed, result.state.key.device)
        model = pretrain.model_of(config, tokenizer.vocab_size)
        text = "".join(continuation(architecture, result.state.params, model, tokenizer, "", key, tokens=300))
        folder.write(run / "sample.txt", text + "\n")
        show.note(f"\na sample:\n\n{progress.printable(text)}\n")
        more = f"   more text: functrain generate {run} --prompt 'def '"
    show.note(f"learning curve: {plotting.draw([run], run / 'loss.png')}{more}")
