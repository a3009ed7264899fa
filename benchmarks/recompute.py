"""Peak memory and time of the gradient of a stack of layers, with and without recompute.

    python benchmarks/recompute.py [--only eager|per-example|compiled] [--rounds 3]

Peak is what torch's allocator held at most in one call, above what it held before it. Variants take turns, round by
round, in one process; times are medians.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from step import peak_bytes, seconds_by_turns
from torch.utils.checkpoint import checkpoint

import functrain as ft

LAYERS, WIDTH, ROWS, TOKENS = 24, 64, 16, 128
Run = Callable[[], Any]


def block(layer: Any, x: Any) -> Any:
    h = ft.nn.layer_norm(x, **layer["norm"])
    h = ft.nn.gelu(ft.nn.linear(h, **layer["up"]))
    return x + ft.nn.linear(h, **layer["down"])


def loss_fn(layers: Any, batch: Any, key: Any) -> ft.Loss:
    x = ft.nn.stack(block, layers, batch["x"])
    return ft.Loss(torch.sum(x**2), torch.ones(()) * x.shape[0], {})


def loss_by_torch(layers: Any, batch: Any, key: Any) -> ft.Loss:
    x = batch["x"]
    for layer in layers:
        x = checkpoint(block, layer, x, use_reentrant=False, preserve_rng_state=False)
    return ft.Loss(torch.sum(x**2), torch.ones(()) * x.shape[0], {})


def init(layers: int) -> Any:
    def linear(key: Any, inputs: int, outputs: int) -> Any:
        return {"weight": ft.random.normal(key, (inputs, outputs)) * inputs**-0.5, "bias": torch.zeros(outputs)}

    keys = [ft.random.split(key).unbind() for key in ft.random.split(ft.random.key(0), layers).unbind()]

    def norm() -> Any:
        return {"weight": torch.ones(WIDTH), "bias": torch.zeros(WIDTH)}

    return [{"norm": norm(), "up": linear(a, WIDTH, 4 * WIDTH), "down": linear(b, 4 * WIDTH, WIDTH)} for a, b in keys]


def batch(rows: int = ROWS) -> Any:
    return {"x": ft.random.normal(ft.random.key(1), (rows, TOKENS, WIDTH))}


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"budget": 1.0},
    "recompute": {"budget": 0.0},
    "recompute, budget 0.5": {"budget": 0.5},
    "recompute, policy dots": {"policy": "dots"},
    "recompute, policy 0.5": {"policy": 0.5},
}


def eager() -> dict[str, Run]:
    params, rows, key = init(LAYERS), batch(), ft.random.key(2)
    fns = {name: ft.grad(ft.recompute_layers(loss_fn, **options)) for name, options in VARIANTS.items()}
    fns["torch.utils.checkpoint"] = ft.grad(loss_by_torch)
    return {name: lambda fn=fn: fn(params, rows, key) for name, fn in fns.items()}


def per_example() -> dict[str, Run]:
    # few examples: a gradient for each of them is in every variant's peak
    params, rows, key = init(LAYERS), {"x": batch(4)["x"].repeat(1, 8, 1)}, ft.random.key(2)
    fns = {name: ft.per_example_grad(ft.recompute_layers(loss_fn, **o)) for name, o in VARIANTS.items()}
    return {name: lambda fn=fn: fn(params, rows, key) for name, fn in fns.items()}


def compiled() -> dict[str, Run]:
    return {name: _step(ft.recompute_layers(loss_fn, **o)) for name, o in VARIANTS.items()}


def _step(loss: Any) -> Run:
    optimizer, key, data = ft.optim.sgd(1e-6), ft.random.key(2), batch()
    step = ft.compile(ft.train_step(loss, optimizer), donate=True)
    state = ft.init_state(init(LAYERS), optimizer, key=key)

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, data)
        return metrics["loss"]

    return run


def measure(title: str, variants: dict[str, Run], rounds: int) -> None:
    first = {}
    for name, run in variants.items():
        start = time.perf_counter()
        run()
        first[name] = time.perf_counter() - start
        run()
    seconds = seconds_by_turns(variants, rounds)
    peaks = {name: peak_bytes(run) for name, run in variants.items()}
    name = next(iter(variants))
    base, least = seconds[name], peaks[name]
    print(f"\n{title}\n\n| | peak MB | of the first | ms | of the first | first call s |\n|---|---|---|---|---|---|")
    for name in variants:
        ms = seconds[name]
        print(
            f"| {name} | {peaks[name] / 1e6:.1f} | {peaks[name] / least:.3f} | {ms * 1e3:.0f} | {ms / base:.2f} "
            f"| {first[name]:.1f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("eager", "per-example", "compiled"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {LAYERS} layers of width {WIDTH}")
    for name, make in {
        "eager": eager,
        "per-example": per_example,
        "compiled": compiled,
    }.items():
        if options.only in (None, name):
            measure(name, make(), options.rounds)


if __name__ == "__main__":
    main()
