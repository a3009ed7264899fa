"""Peak memory and time of a gradient through a whole training run, by the number of its steps.

    python benchmarks/unroll.py [--steps 16 64 256] [--rounds 3]

An MLP is trained by Adam on one batch; the gradient is that of the last loss by the learning rate and the first params.
Peak is what torch's allocator held at most in one call, above what it held before it; it is the same in every round.
Variants take turns, round by round, in one process; times are medians.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from step import peak_bytes, seconds_by_turns

import functrain as ft

WIDTH, ROWS = 64, 32
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "recompute": {"recompute": True},
    "truncate=8": {"truncate": 8},
    "recompute, truncate=8": {"recompute": True, "truncate": 8},
}


def loss_fn(params: Any, batch: Any, key: Any) -> Any:
    hidden = torch.tanh(batch["x"] @ params["up"])  # (B, D)
    return torch.mean((hidden @ params["down"] - batch["y"]) ** 2)


def gradient(steps: int, options: dict[str, Any]) -> Callable[[], Any]:
    keys = ft.random.split(ft.random.key(0), 4).unbind()
    params = {
        "up": ft.random.normal(keys[0], (WIDTH, WIDTH)) / 8,
        "down": ft.random.normal(keys[1], (WIDTH, WIDTH)) / 8,
    }
    batch = {"x": ft.random.normal(keys[2], (ROWS, WIDTH)), "y": ft.random.normal(keys[3], (ROWS, WIDTH))}
    tx = ft.optim.inject_hyperparams(ft.optim.adam)(learning_rate=1e-3, eps_root=1e-8)
    step = ft.train_step(loss_fn, tx)
    start = ft.init_state(params, tx, key=keys[0])

    def last_loss(params: Any, rate: Any) -> Any:
        hyperparams = {**start.opt_state.hyperparams, "learning_rate": rate}
        state = start._replace(params=params, opt_state=start.opt_state._replace(hyperparams=hyperparams))
        state, _ = ft.unroll(step, state, [batch] * steps, **options)
        return loss_fn(state.params, batch, None)

    grad = ft.grad(last_loss, argnums=(0, 1))
    return lambda: grad(params, torch.tensor(1e-3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; {ROWS} rows, two matrices of {WIDTH} squared\n"
    )
    print("| steps | | peak MB | of the steps before | ms | of plain |\n|---|---|---|---|---|---|")
    before: dict[str, tuple[int, int]] = {}
    for steps in options.steps:
        runs = {name: gradient(steps, chosen) for name, chosen in VARIANTS.items()}
        seconds = seconds_by_turns(runs, options.rounds)
        plain = seconds["plain"]
        for name, run in runs.items():
            peak, ms = peak_bytes(run), seconds[name]
            growth = "" if name not in before else f"{peak / before[name][1]:.2f}"
            before[name] = steps, peak
            print(f"| {steps} | {name} | {peak / 1e6:.2f} | {growth} | {ms * 1e3:.0f} | {ms / plain:.2f} |", flush=True)
    if len(options.steps) > 1:
        print(f"\nsquare root of the last two numbers of steps: {math.sqrt(options.steps[-1] / options.steps[-2]):.2f}")


if __name__ == "__main__":
    main()
