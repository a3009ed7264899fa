"""Time of 32 runs of a small MLP: one sweep, and a loop of compiled solo steps.

    python benchmarks/sweep.py [--lanes 32] [--rounds 15]

Every lane clips by global norm and runs AdamW with a learning rate of its own, on one batch of 32 rows. Both take
turns in one process; a round is one step of every lane, printed are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import functrain as ft

INPUTS, WIDTH, ROWS = 16, 64, 32


def init(key: Any) -> Any:
    sizes = [(INPUTS, WIDTH), (WIDTH, WIDTH), (WIDTH, 1)]
    return [
        {"weight": ft.random.normal(ft.random.fold_in(key, i), size) / size[0] ** 0.5, "bias": torch.zeros(size[1])}
        for i, size in enumerate(sizes)
    ]


def loss_fn(params: Any, batch: Any, key: Any) -> Any:
    x = batch["x"]
    for layer in params[:-1]:
        x = torch.relu(ft.nn.linear(x, **layer))
    return torch.mean((ft.nn.linear(x, **params[-1]).squeeze(-1) - batch["y"]) ** 2)


@ft.optim.inject_hyperparams
def optimizer(learning_rate: Any) -> Any:
    return ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(learning_rate, weight_decay=0.1))


def variants(lanes: int) -> dict[str, Callable[[], Any]]:
    rates = [1e-4 * 1.1**i for i in range(lanes)]
    tx = optimizer(learning_rate=1e-3)
    batch = {"x": torch.randn(ROWS, INPUTS), "y": torch.randn(ROWS)}

    def start(key: Any) -> Any:
        return ft.init_state(init(key), tx, key=key)

    solo = ft.compile(ft.train_step(loss_fn, tx), donate=True)
    single = ft.sweep(ft.train_step(loss_fn, tx), {"learning_rate": rates, "seed": range(lanes)})
    states = single.init(start)
    alone = [single.lane(states, i) for i in range(lanes)]
    swept = ft.compile(single, donate=True)

    def loop() -> Any:
        losses = []
        for i in range(lanes):
            alone[i], metrics = solo(alone[i], batch)
            losses.append(metrics["loss"])
        return torch.stack(losses)

    def together() -> Any:
        nonlocal states
        states, metrics = swept(states, batch)
        return metrics["loss"]

    return {"a loop of compiled solo steps": loop, "one sweep": together}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lanes", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    runs = variants(options.lanes)
    for _ in range(3):
        losses = [run() for run in runs.values()]
    # float32, three steps of Adam: the lanes are the same runs
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-4)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(10):
                run()
            times[name].append((time.perf_counter() - start) / 10 * 1e3)
    medians = {name: statistics.median(row) for name, row in times.items()}
    ratio = medians["a loop of compiled solo steps"] / medians["one sweep"]
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(json.dumps({"lanes": options.lanes, "ms": medians, "ratio": ratio}, indent=1))


if __name__ == "__main__":
    main()
