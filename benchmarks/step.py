"""Time and peak memory of a training step, side by side with torch.nn.Module and fused AdamW.

    python benchmarks/step.py [--only mlp|gpt-fp32|gpt-bf16|gpt-deep] [--rounds 7] [--guard]

Every step clips by global norm and runs AdamW. The variants take turns, round by round, in one process; printed are
medians over the rounds and the ratio to the best of the others. Peak is what torch's allocator held at most in one
step, above what it held before it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from modules import GPT, MLP, stepper
from torch.profiler import ProfilerActivity, profile

import functrain as ft
from functrain.models import gpt2

GPT_SHAPE = {"vocab": 8192, "context": 128, "layers": 2, "heads": 8, "width": 512}
DEEP_SHAPE = {"vocab": 65, "context": 64, "layers": 12, "heads": 4, "width": 128}
Run = Callable[[], Any]


def optimizer() -> Any:
    decay = ft.optim.adamw(1e-3, b2=0.99, weight_decay=0.1, mask=lambda p: ft.tree.map(lambda x: x.dim() > 1, p))
    return ft.optim.chain(ft.optim.clip_by_global_norm(1.0), decay)


def ours(params: Any, loss_fn: Any, batch: Any, guard: Any = None) -> Run:
    key = ft.random.key(0)
    tx = optimizer()
    step = ft.compile(ft.train_step(loss_fn, tx, guard=guard), donate=True)
    state = ft.init_state(params, tx, key=key, guard=guard)

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics["loss"]

    return run


def gpt(*, bf16: bool, shape: dict[str, int] = GPT_SHAPE, rows: int = 8, guarded: bool = False) -> dict[str, Run]:
    torch.manual_seed(0)
    tokens = torch.randint(shape["vocab"], (rows, shape["context"] + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    config = gpt2.Config(**shape)

    def loss_fn(params: Any, batch: Any, key: Any) -> Any:
        hidden = gpt2.hidden(params, batch["tokens"], config, key=key)
        return ft.losses.next_token_from_hidden(hidden, params["wte"], batch["targets"])

    if bf16:
        loss_fn = ft.mixed_precision(loss_fn, ft.Policy(compute=torch.bfloat16))
    eager, compiled = (stepper(GPT(**shape), bf16=bf16), stepper(torch.compile(GPT(**shape)), bf16=bf16))
    batch = {"tokens": inputs, "targets": targets}
    return {
        "module eager + fused AdamW": lambda: eager(inputs, targets),
        "torch.compile(module) + fused AdamW": lambda: compiled(inputs, targets),
        **by_guard(lambda guard: ours(gpt2.init(config, ft.random.key(0)), loss_fn, batch, guard), guarded),
    }


def by_guard(make: Callable[[Any], Run], guarded: bool) -> dict[str, Run]:
    """Return the step without a guard, and after it, if asked for, the one with it."""
    steps = {"functrain compiled, donated": make(None)}
    return steps | {"with guard=skip_nonfinite()": make(ft.train.skip_nonfinite())} if guarded else steps


def mlp(*, guarded: bool = False) -> dict[str, Run]:
    torch.manual_seed(0)
    x, y = torch.randn(32, 8), torch.randn(32, 1)

    def init(key: Any) -> Any:
        shapes = [(8, 64), (64, 64), (64, 1)]
        keys = ft.random.split(key, 3).unbind()
        weights = [ft.random.normal(k, s) * s[0] ** -0.5 for k, s in zip(keys, shapes, strict=True)]
        return [{"weight": w, "bias": torch.zeros(w.shape[1])} for w in weights]

    def loss_fn(params: Any, batch: Any, key: Any) -> Any:
        h = batch["x"]
        for layer in params[:-1]:
            h = torch.relu(ft.nn.linear(h, **layer))
        return torch.mean((ft.nn.linear(h, **params[-1]) - batch["y"]) ** 2)

    eager, compiled = stepper(MLP(8, 64), bf16=False), stepper(torch.compile(MLP(8, 64)), bf16=False)
    return {
        "module eager + fused AdamW": lambda: eager(x, y),
        "torch.compile(module) + fused AdamW": lambda: compiled(x, y),
        **by_guard(lambda guard: ours(init(ft.random.key(0)), loss_fn, {"x": x, "y": y}, guard), guarded),
    }


def seconds_by_turns(variants: dict[str, Run], rounds: int) -> dict[str, float]:
    """Return the median time of each variant, which take turns, round by round."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def peak_bytes(run: Run) -> int:
    """What torch's allocator held at most during one call, above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    held = highest = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        if event["args"]["Device Type"] == 0:
            held += event["args"]["Bytes"]
            highest = max(highest, held)
    return highest


def measure(title: str, variants: dict[str, Run], *, rounds: int, steps: int) -> None:
    for run in variants.values():
        for _ in range(3):
            run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.perf_counter()
            for _ in range(steps):
                run()
            times[name].append((time.perf_counter() - start) / steps)
    peaks = {name: peak_bytes(run) for name, run in variants.items()}
    medians = {name: statistics.median(values) for name, values in times.items()}
    *others, last = variants
    best, least = min(medians[n] for n in others), min(peaks[n] for n in others)
    print(f"\n{title}\n")
    print("| step | ms, median | spread | ratio | peak MB | ratio |\n|---|---|---|---|---|---|")
    for name in variants:
        spread = f"{min(times[name]) * 1e3:.3g}-{max(times[name]) * 1e3:.3g}"
        print(
            f"| {name} | {medians[name] * 1e3:.4g} | {spread} | {medians[name] / best:.3f} "
            f"| {peaks[name] / 1e6:.4g} | {peaks[name] / least:.3f} |"
        )
    print(f"\n{last}: {best / medians[last]:.2f} times as fast as the best of the others")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("mlp", "gpt-fp32", "gpt-bf16", "gpt-deep"))
    parser.add_argument("--guard", action="store_true", help="measure the step with a guard, too")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {machine}")
    if options.only in (None, "mlp"):
        measure("MLP 8-64-64-1, batch 32", mlp(guarded=options.guard), rounds=options.rounds, steps=300)
    for name, bf16 in (("gpt-fp32", False), ("gpt-bf16", True)):
        if options.only in (None, name):
            title = f"GPT of 2 layers, width 512, vocabulary 8192, batch 8x128, {'bfloat16' if bf16 else 'float32'}"
            measure(title, gpt(bf16=bf16, guarded=options.guard), rounds=options.rounds, steps=3)
    if options.only in (None, "gpt-deep"):
        title = "GPT of 12 layers, width 128, vocabulary 65, batch 12x64, float32"
        measure(
            title, gpt(bf16=False, shape=DEEP_SHAPE, rows=12, guarded=options.guard), rounds=options.rounds, steps=3
        )


if __name__ == "__main__":
    main()
