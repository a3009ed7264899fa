"""Time of an AdamW update, side by side with torch.optim.AdamW in the same process.

    python benchmarks/optimizers.py [--layers 12] [--rounds 9]

The tree is GPT-2's: 148 leaves and 124 million parameters in 12 layers of width 768. The variants take turns, round by
round; printed are medians over the rounds. Ours returns new trees; compiled, it takes over the old ones' memory. In
eager, most of its time is the operating system handing out fresh memory, which the C library gives back after every
step unless told not to: MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=16000000000 in the environment (glibc) keeps it.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import functrain as ft
from functrain.models import gpt2

HYPERPARAMS = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


def ours(params: Any, grads: Any, *, compiled: bool) -> Callable[[], None]:
    tx = ft.optim.adamw(1e-4, **HYPERPARAMS)

    def update(state: Any, grads: Any) -> tuple[Any, dict[str, Any]]:
        params, opt_state = state
        updates, opt_state = tx.update(grads, opt_state, params)
        return (ft.optim.apply_updates(params, updates), opt_state), {}

    step = ft.compile(update, donate=True) if compiled else update
    state: Any = (ft.tree.map(torch.clone, params), tx.init(params))

    def run() -> None:
        nonlocal state
        state, _ = step(state, grads)

    return run


def theirs(params: Any, grads: Any, **kind: bool) -> Callable[[], None]:
    leaves = [torch.nn.Parameter(leaf.clone()) for leaf in ft.tree.leaves(params)]
    for leaf, grad in zip(leaves, ft.tree.leaves(grads), strict=True):
        leaf.grad = grad
    optimizer = torch.optim.AdamW(leaves, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, **kind)
    return optimizer.step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    config = gpt2.Config(vocab=50257, context=1024, layers=args.layers, heads=12, width=768)
    key, key_grads = ft.random.split(ft.random.key(0)).unbind()
    params = gpt2.init(config, key)
    grads = ft.tree.scale(0.1, gpt2.init(config, key_grads))
    malloc = "kept by malloc" if "MALLOC_MMAP_MAX_" in os.environ else "as malloc likes"
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"AdamW, {len(ft.tree.leaves(params))} leaves, {ft.tree.size(params):,} parameters, memory {malloc}")
    runs = {
        "functrain compiled, donated": ours(params, grads, compiled=True),
        "torch fused": theirs(params, grads, fused=True),
        "functrain eager": ours(params, grads, compiled=False),
        "torch foreach": theirs(params, grads, foreach=True),
    }
    start = time.perf_counter()
    for run in runs.values():
        run()
        run()
    print(f"first two steps of all, compilation included: {time.perf_counter() - start:.1f} s")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(f"{name:30} {medians[name]:8.1f} ms   ({min(values):.1f} to {max(values):.1f})")
    print(f"compiled / fused: {medians['functrain compiled, donated'] / medians['torch fused']:.2f}")
    print(f"eager / foreach: {medians['functrain eager'] / medians['torch foreach']:.2f}")


if __name__ == "__main__":
    main()
