"""What `functrain profile` does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

import functrain as ft
from functrain.cli import bars
from functrain.recipes import architectures, optimizers, precision, pretrain
from functrain.recipes import profiling as recipe
from functrain.recipes.config import Config


def profile(
    wished: Config,
    what: str,
    run: Path | None,
    asked: Config,
    trace: Path,
    *,
    warmup: int,
    active: int,
    sort: str,
    rows: int,
) -> None:
    """Take steps as `wished`, what the run or preset `what` has `asked` for with changes, and show their cost."""
    device = pretrain.device_of(wished.device)
    config, told = precision.decided(wished, device, asked if run else None)
    batches, model = _data(config, run)
    for line in told:
        print(line)
    optimizer, key = optimizers.optimizer_of(config), ft.random.key(config.seed, device)
    pairs: Any = {"loss_scale": precision.loss_scale_of(config), "guard": pretrain.guard_of(config)}
    state = ft.init_state(architectures.of(config.model).module.init(model, key), optimizer, key=key, **pairs)
    step = ft.train_step(pretrain.loss_of(config, model), optimizer, accumulate=config.accumulate, **pairs)
    compiled = ft.compile(step, donate=True) if config.compile else step
    print(
        f"{what}: {ft.tree.size(state.params):,} parameters on {device}, {torch.get_num_threads()} threads", flush=True
    )
    with bars.bar("profiling", "steps") as shown:
        found = recipe.profiled(
            compiled, state, batches, device=device, warmup=warmup, active=active, trace=trace,
            progress=shown,
        )  # fmt: skip
    _show(found, config, device)
    print(_table(found, sort, rows))
    print(f"\ntrace: {trace}   open it in ui.perfetto.dev or chrome://tracing")


def _data(config: Config, run: Path | None) -> tuple[Any, Any]:
    """Return batches of a run's own tokens, or of tokens drawn at random: what they are changes no time."""
    vocabulary, files = config.data.vocabulary, list[Path]()
    if run is not None:
        vocabulary = ft.data.load_tokenizer(run / "tokenizer.json").vocab_size
        files = sorted((run / "tokens").glob("train-*.bin"))
    batches = architectures.of(config.model).objective.drawn(config, vocabulary, files)
    return batches, pretrain.model_of(config, vocabulary)


def _show(found: recipe.Profile, config: Config, device: torch.device) -> None:
    tokens = config.batch * config.model.context
    where = "no kernel runs" if device.type == "cuda" else "only Python runs"
    print(f"first step          {found.first_seconds:.1f} s{', with its compilation' if config.compile else ''}")
    print(f"a step              {found.step_seconds * 1e3:.2f} ms, {tokens / found.step_seconds:,.0f} tokens/s")
    print(f"waiting for input   {found.input_share:.1%} of it")
    print(
        f"{where:19} {found.idle_share:.1%} of a step under the profiler, in {found.gaps:,.0f} gaps, the longest "
        f"{found.longest_gap_seconds * 1e3:.2f} ms"
    )
    whose = "tensors on the device" if device.type == "cuda" else "the process"
    print(f"peak memory         {found.peak_bytes / 1e6:,.0f} MB of {whose}\n")


def _table(found: recipe.Profile, sort: str, most: int) -> str:
    key = (lambda row: row.self_seconds) if sort == "time" else (lambda row: row.self_bytes)
    total = sum(row.self_seconds for row in found.operations) or 1.0
    lines = [f"{'operation':40} {'calls':>8} {'self ms':>9} {'share':>6} {'memory kB':>12}"]
    for row in sorted(found.operations, key=key, reverse=True)[:most]:
        lines.append(
            f"{_named(row.name):40} {row.calls:8,.0f} {row.self_seconds * 1e3:9.3f} {row.self_seconds / total:6.1%} "
            f"{row.self_bytes / 1e3:12,.1f}"
        )
    return "\n".join(
        [*lines, "each of one step: without what an operation calls, and memory that it did not give back"]
    )


def _named(name: str) -> str:
    plain = {recipe.STEP: "(Python, between the operations)", recipe.INPUT: "(waiting for a batch)"}.get(name)
    program = re.fullmatch(r"## Call CompiledFxGraph (\w+) ##", name)
    text = plain or (f"compiled program {program[1][:8]}" if program else name)
    return text if len(text) <= 40 else f"{text[:20]}...{text[-17:]}"
