"""Train steps of `ft.models` beside transformers' modules under torch.compile, and first steps by depth.

    python benchmarks/models_beside_transformers.py [--only gpt2,llama] [--size small|100m|tiny] [--rounds 7]
    python benchmarks/models_beside_transformers.py --first-step [--repeat 3]

A step of ours, with `ft.optim.adamw`, compiled and donated, beside a step of the module under torch.compile with fused
AdamW: the same float32 weights, no dropout, the same batch. Each case is a process of its own, in which the two take
turns, round by round; losses that differ are an error. The module computes its attention by torch's kernel, and ours by
what `--attention` says. A module of BERT computes logits of all places, as `bert-all` does; `bert` those of the masked
ones. Peak is what torch's allocator held at most in one step, above what it held before it.

`--first-step`: seconds from building the model to the end of the first step, imports not counted, of models of 3 and of
12 layers, with an empty cache folder, each in a process of its own; CPU seconds are those of Python and of the C++
compiler together.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers_cases import CASES, Batch, Case, llama_loss

import functrain as ft

RATES = {"lr": 1e-4, "weight_decay": 0.01}
FIRST = ("dense", "experts", "windows")


HEADER = (
    "| model | size | parameters, M | batch | module, ms | ours, ms | ratio | module, peak MiB | ours | ratio |\n"
    f"|{'---|' * 10}"
)


class WithLoss(nn.Module):
    """A module that returns its mean loss."""

    def __init__(self, module: nn.Module, loss: Callable[[Any, Batch], Tensor]) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, batch: Batch) -> Tensor:
        return self.loss(self.module, batch)


def their_step(case: Case, module: nn.Module, batch: Batch) -> Callable[[], Tensor]:
    optimizer = torch.optim.AdamW(module.parameters(), fused=True, **RATES)
    loss_fn = torch.compile(WithLoss(module.train(), case.theirs))

    def run() -> Tensor:
        loss = loss_fn(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return run


def our_step(case: Case, folder: str, attention: str, batch: Batch) -> Callable[[], Tensor]:
    model = getattr(ft.models, case.model)
    params, config = model.from_hf(folder)
    config = dataclasses.replace(config, attention=attention)
    tx, key = ft.optim.adamw(RATES["lr"], weight_decay=RATES["weight_decay"]), ft.random.key(0)
    step = ft.compile(
        ft.train_step(lambda params, batch, key: case.loss(model, params, config, batch), tx), donate=True
    )
    state = ft.init_state(params, tx, key=key)

    def run() -> Tensor:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics["loss"]

    return run


def compare(name: str, size: str, attention: str, rounds: int) -> str:
    """Return a row of the table."""
    import transformers
    from step import peak_bytes

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    case = CASES[name]
    kind = getattr(transformers, case.kind)
    module = kind(kind.config_class(**case.sizes[size], attn_implementation="sdpa"))
    batch = case.batch(module.config, case.batches[size])
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        runs = {"module": their_step(case, module, batch), "ours": our_step(case, folder, attention, batch)}
    for turn in range(3):
        found = {which: float(run()) for which, run in runs.items()}
        if abs(found["ours"] - found["module"]) > 1e-3 * abs(found["module"]):
            raise SystemExit(f"{name}, {size}: expected the losses of step {turn} to be equal, came {found}")
    times: dict[str, list[float]] = {which: [] for which in runs}
    for _ in range(rounds):
        for which, run in runs.items():
            start = time.perf_counter()
            run()
            times[which].append((time.perf_counter() - start) * 1e3)
    peaks = {which: peak_bytes(run) / 2**20 for which, run in runs.items()}
    middle = {which: statistics.median(values) for which, values in times.items()}
    cells = [f"{middle[which]:.4g} ({min(times[which]):.4g}-{max(times[which]):.4g})" for which in runs]
    count = sum(p.numel() for p in module.parameters()) / 1e6
    shape = "x".join(map(str, case.batches[size]))
    return (
        f"| {name}, {attention} | {size} | {count:.4g} | {shape} | {cells[0]} | {cells[1]} "
        f"| {middle['ours'] / middle['module']:.3f} | {peaks['module']:.4g} | {peaks['ours']:.4g} "
        f"| {peaks['ours'] / peaks['module']:.3f} |"
    )


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def first_step(kind: str, layers: int) -> dict[str, float]:
    from functrain.models import llama

    # rooms are imported where they are named first, and imports are not counted
    _ = ft.compile, ft.train_step, ft.init_state, ft.losses.next_token_from_hidden, ft.random.key, ft.optim.adamw
    more: dict[str, Any] = {
        "dense": {}, "experts": {"experts": 4}, "windows": {"window": 16, "window_layers": tuple(range(1, layers, 2))},
    }[kind]  # fmt: skip
    tokens = torch.randint(65, (12, 65))
    batch = {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}
    start, used = time.perf_counter(), cpu_seconds()
    config = llama.Config(vocab=65, context=64, layers=layers, heads=4, width=128, inner=256, tied=True, **more)

    def loss_fn(params: Any, batch: Any, key: Any) -> Any:
        if not config.experts:
            return llama_loss(llama, params, config, batch)
        x, balance = llama.hidden_and_balance(params, batch["tokens"], config)
        loss = ft.losses.next_token_from_hidden(x, llama.head(params), batch["targets"])
        return loss._replace(total=loss.total + 0.01 * loss.weight * balance.total / balance.weight)

    tx, key = ft.optim.adamw(1e-3, weight_decay=0.1), ft.random.key(0)
    step = ft.compile(ft.train_step(loss_fn, tx), donate=True)
    _, metrics = step(ft.init_state(llama.init(config, key), tx, key=key), batch)
    metrics["loss"].item()
    return {"wall": time.perf_counter() - start, "cpu": cpu_seconds() - used}


def child(*arguments: str, cache: str | None = None) -> str:
    environment = os.environ | ({"TORCHINDUCTOR_CACHE_DIR": cache} if cache else {})
    command = [sys.executable, "-W", "ignore", __file__, *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[3:])}: it ended with {done.returncode}")
    return done.stdout.splitlines()[-1]


def first_steps(kinds: list[str], repeat: int) -> None:
    print("| first step, cold | layers | s | CPU s | libraries |\n|---|---|---|---|---|")
    for kind in kinds:
        wall: dict[int, float] = {}
        used: dict[int, float] = {}
        for layers in (3, 12):
            found = []
            for _ in range(repeat):
                with tempfile.TemporaryDirectory() as cache:
                    found.append(json.loads(child("--child", kind, str(layers), cache=cache)))
                    libraries = len(list(Path(cache).rglob("*.so")))
            wall[layers], used[layers] = (statistics.median(one[of] for one in found) for of in ("wall", "cpu"))
            print(f"| {kind} | {layers} | {wall[layers]:.1f} | {used[layers]:.1f} | {libraries} |", flush=True)
        print(f"| {kind} | 12 to 3 | {wall[12] / wall[3]:.2f} | {used[12] / used[3]:.2f} | |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda names: names.split(","), help="names of cases, with commas")
    parser.add_argument("--size", choices=("small", "100m", "tiny"), help="tiny ones only show that the steps agree")
    parser.add_argument("--attention", choices=("fused", "math"), default="fused")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--first-step", action="store_true")
    parser.add_argument("--repeat", type=int, default=3, help="of the first step")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, value = options.child
        if value.isdigit():
            print(json.dumps(first_step(name, int(value))))
        else:
            print(compare(name, value, options.attention, options.rounds))
        return
    known = list(FIRST if options.first_step else CASES)
    chosen = options.only or known
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"--only: expected some of {', '.join(known)}, came {', '.join(unknown)}")
    from zoo import machine

    print(machine(argparse.Namespace(dtype="float32", rounds=options.rounds)), flush=True)
    if options.first_step:
        first_steps(chosen, options.repeat)
        return
    print(HEADER, flush=True)
    for size in [options.size] if options.size else ["small", "100m"]:
        for name in chosen:
            more = ("--attention", options.attention, "--rounds", str(options.rounds))
            print(child("--child", name, size, *more), flush=True)


if __name__ == "__main__":
    main()
