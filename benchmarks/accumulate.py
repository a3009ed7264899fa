"""Peak memory, time, compile time and size of the program of a step that accumulates, for 1, 2, 8 and 32 parts.

    python benchmarks/accumulate.py [--only small|large|many|compile] [--rounds 3]

Peak is what torch's allocator held at most in one step, above what it held before it. The sum of the gradients is as
large as the parameters, and its share of the peak is what to expect beyond one part. Compile times are of processes
with empty cache folders.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from typing import Any
from unittest.mock import patch

import torch
from recompute import Run, block, measure

import functrain as ft

# layers, width, tokens in a row, rows of a part, share of the layers that keep their activations
SHAPES = {
    "small": (24, 64, 128, 4, 1.0),
    "large": (24, 64, 128, 16, 1.0),
    "many": (12, 256, 64, 1, 0.0),
}


def loss_fn(layers: Any, batch: Any, key: Any) -> ft.Loss:
    x = ft.nn.stack(block, layers, batch["x"])
    return ft.Loss(torch.sum(x**2), torch.ones(()) * x.shape[0], {})


def init(layers: int, width: int) -> Any:
    def linear(key: Any, inputs: int, outputs: int) -> Any:
        return {"weight": ft.random.normal(key, (inputs, outputs)) * inputs**-0.5, "bias": torch.zeros(outputs)}

    def layer(key: Any) -> Any:
        up, down = ft.random.split(key).unbind()
        norm = {"weight": torch.ones(width), "bias": torch.zeros(width)}
        return {"norm": norm, "up": linear(up, width, 4 * width), "down": linear(down, 4 * width, width)}

    return [layer(key) for key in ft.random.split(ft.random.key(0), layers).unbind()]


def step_of(shape: tuple[int, int, int, int, float], parts: int, **options: Any) -> Run:
    layers, width, tokens, rows, kept = shape
    loss = loss_fn if kept == 1.0 else ft.recompute_layers(loss_fn, budget=kept)
    optimizer, key = ft.optim.sgd(1e-6), ft.random.key(2)
    data = {"x": ft.random.normal(ft.random.key(1), (rows * parts, tokens, width))}
    step = ft.compile(ft.train_step(loss, optimizer, **(options or {"accumulate": parts})), donate=True)
    state = ft.init_state(init(layers, width), optimizer, key=key)

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, data)
        return metrics["loss"]

    return run


def memory(name: str, rounds: int) -> None:
    shape = layers, width, tokens, rows, kept = SHAPES[name]
    variants = {"one part": step_of(shape, 1)}
    # rows as many as the batch has: a loop of one turn
    variants["one part, compiled as a part"] = step_of(shape, 1, accumulate_rows=rows)
    variants |= {f"accumulate({n})": step_of(shape, n) for n in (2, 8, 32)}
    size = ft.tree.bytes(init(layers, width)) / 1e6
    recomputed = "" if kept else ", recomputed"
    title = (
        f"{name}: parts of {rows}x{tokens} tokens, {layers} layers of width {width}{recomputed}; the sum: {size:.1f} MB"
    )
    measure(title, variants, rounds)


def first_step(parts: int) -> None:
    from torch._inductor import metrics

    from functrain.compiler.inductor import lowering

    programs, lower = [], lowering.lower

    def counted(module: Any, mode: Any, which: str, **options: Any) -> Any:
        programs.append(which)
        return lower(module, mode, which, **options)

    run = step_of(SHAPES["small"], parts)
    with patch.object(lowering, "lower", counted):
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
    print(seconds, len(programs), metrics.ir_nodes_pre_fusion, metrics.generated_kernel_count)


def compile_times() -> None:
    print("\n| parts | first step s | programs | operations compiled | kernels |\n|---|---|---|---|---|")
    for parts in (1, 2, 8, 32):
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, __file__, "--child", str(parts)]
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        seconds, programs, nodes, kernels = done.stdout.split()[-4:]
        print(f"| {parts} | {float(seconds):.1f} | {programs} | {nodes} | {kernels} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=(*SHAPES, "compile"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", type=int, metavar="PARTS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return first_step(options.child)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in SHAPES:
        if options.only in (None, name):
            memory(name, options.rounds)
    if options.only in (None, "compile"):
        compile_times()


if __name__ == "__main__":
    main()
