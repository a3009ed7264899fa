"""`functrain profile`: where the time and the memory of a run's training step go."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy
import torch
import tyro

import functrain as ft
from functrain.cli import bars
from functrain.cli.options import UsageError, parse
from functrain.models import gpt2
from functrain.recipes import folder, precision, pretrain, profiling
from functrain.recipes.config import PRESETS, Config

DESCRIPTION = """Run a few training steps under torch.profiler, those of a run or of a preset of `functrain train`, with
changes as there, and show what takes their time and memory. The run itself is left as it is: the model begins anew.

A trace of every operation is written for ui.perfetto.dev or chrome://tracing."""


@dataclass(frozen=True, kw_only=True)
class Options:
    config: Annotated[Config, tyro.conf.arg(name="")]
    warmup: int = 2
    """Steps after the first, which compiles, that are not measured."""
    active: int = 5
    """Steps that are measured: by the clock, then under the profiler."""
    sort: Literal["time", "memory"] = "time"
    """What the operations are sorted by."""
    rows: int = 15
    """Operations in the table."""
    trace: str = ""
    """The trace's file; RUN/trace.json.gz for a run, ./trace.json.gz for a preset, if it is left out."""


def main(words: Sequence[str]) -> None:
    if not words or words[0].startswith("-") and not {"-h", "--help"} & set(words):
        raise UsageError("profile: expected a run or a preset; functrain profile RUN|PRESET")
    what, rest = ("tiny", words) if words[0].startswith("-") else (words[0], words[1:])
    run, asked = _asked(what)
    options = parse(
        Options, rest, prog="functrain profile RUN|PRESET", description=DESCRIPTION, default=Options(config=asked)
    )
    for name, value, least in (("warmup", options.warmup, 0), ("active", options.active, 1), ("rows", options.rows, 1)):
        if value < least:
            raise UsageError(f"--{name}: expected at least {least}, came {value}")
    trace = Path(options.trace) if options.trace else (run or Path()) / "trace.json.gz"
    if trace.is_dir() or not trace.name.endswith((".json", ".json.gz")):
        raise UsageError(f"--trace: expected a file that ends in .json or .json.gz, came {trace}")
    device = pretrain.device_of(options.config.device)
    config, told = precision.decided(options.config, device, asked if run else None)
    batches, model = _data(config, run)
    for line in told:
        print(line)
    optimizer, guard, key = pretrain.optimizer_of(config), pretrain.guard_of(config), ft.random.key(config.seed, device)
    state = ft.init_state(gpt2.init(model, key), optimizer, key=key, guard=guard)
    step = ft.train_step(pretrain.loss_of(config, model), optimizer, accumulate=config.accumulate, guard=guard)
    compiled = ft.compile(step, donate=True) if config.compile else step
    print(
        f"{what}: {ft.tree.size(state.params):,} parameters on {device}, {torch.get_num_threads()} threads", flush=True
    )
    with bars.bar("profiling", "steps") as profiling_:
        found = profiling.profiled(
            compiled, state, batches, device=device, warmup=options.warmup, active=options.active, trace=trace,
            progress=profiling_,
        )  # fmt: skip
    _show(found, config, device)
    print(_table(found, options.sort, options.rows))
    print(f"\ntrace: {trace}   open it in ui.perfetto.dev or chrome://tracing")


def _asked(what: str) -> tuple[Path | None, Config]:
    if what in PRESETS:
        return None, PRESETS[what]
    if (Path(what) / "config.toml").is_file():
        return Path(what), folder.read_config(Path(what))
    close = difflib.get_close_matches(what, PRESETS, 1)
    known = f"did you mean {close[0]}?" if close else f"presets are {', '.join(PRESETS)}"
    raise UsageError(f"{what}: expected the folder of a run or a preset, and there is none; {known}")


def _data(config: Config, run: Path | None) -> tuple[ft.data.Windows, gpt2.Config]:
    """Return batches of a run's own tokens, or of tokens drawn at random: what they are changes no time."""
    files = [] if run is None else sorted((run / "tokens").glob("train-*.bin"))
    if files and run is not None:
        tokens: ft.data.Tokens | numpy.ndarray = ft.data.open_tokens(files[-1])
        model = pretrain.model_of(config, ft.data.load_tokenizer(run / "tokenizer.json").vocab_size)
    else:
        vocabulary, length = config.data.vocabulary, max(1_000_000, 2 * config.model.context)
        tokens = numpy.random.default_rng(config.seed).integers(0, vocabulary, length, numpy.uint32)
        model = pretrain.model_of(config, vocabulary)
    windows = ft.data.windows(tokens, batch=config.batch, context=config.model.context, seed=config.seed)
    return windows, model


def _show(found: profiling.Profile, config: Config, device: torch.device) -> None:
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


def _table(found: profiling.Profile, sort: str, most: int) -> str:
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
    plain = {profiling.STEP: "(Python, between the operations)", profiling.INPUT: "(waiting for a batch)"}.get(name)
    program = re.fullmatch(r"## Call CompiledFxGraph (\w+) ##", name)
    text = plain or (f"compiled program {program[1][:8]}" if program else name)
    return text if len(text) <= 40 else f"{text[:20]}...{text[-17:]}"
