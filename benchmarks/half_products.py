"""What half precision costs on a CPU: products by themselves, and a training step, compiled and in eager.

    python benchmarks/half_products.py [--rounds 9]

A GPT of 2 layers, width 128, batch 4x64, clipped by global norm, AdamW. Compiled steps take turns, round by round;
printed are medians. Products are those that `ft.compile` tries a CPU with.
"""

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

import functrain as ft
from functrain.compiler import half_products
from functrain.models import gpt2

CONFIG = gpt2.Config(vocab=512, context=64, layers=2, heads=4, width=128)


def run_of(policy: str, compiled: bool) -> Callable[[], Any]:
    def loss_fn(params: Any, batch: Any, key: Any) -> Any:
        hidden = gpt2.hidden(params, batch["tokens"], CONFIG, key=key)
        return ft.losses.next_token_from_hidden(hidden, params["wte"], batch["targets"])

    tx = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(1e-3))
    step: Any = ft.train_step(ft.mixed_precision(loss_fn, policy), tx)
    step = ft.compile(step, donate=True) if compiled else step
    key = ft.random.key(0)
    state = ft.init_state(gpt2.init(CONFIG, key), tx, key=key)
    tokens = ft.random.randint(key, (4, 65), 0, 512)
    batch = {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}

    def run() -> None:
        nonlocal state
        state, _ = step(state, batch)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", ".* on this CPU a matrix product")
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, {capability}")
    for dtype in half_products.HALF:
        start = time.perf_counter()
        factor = half_products.factor(dtype)
        took = time.perf_counter() - start
        print(f"{dtype}: a product takes {factor:.2g} times as long as in float32, found in {took:.3f} s")
        for size in (128, 256, 512):
            ratio = half_products._seconds(size, dtype) / half_products._seconds(size, torch.float32)
            print(f"{dtype}, {size}x{size}: {ratio:.3g} times")
    policies = {"float32": "full", "bfloat16": "bf16", "float16": "fp16"}
    runs = {name: run_of(policy, True) for name, policy in policies.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(options.rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_ >= 2:
                times[name].append(time.perf_counter() - start)
    plain = statistics.median(times["float32"])
    for name, found in times.items():
        median = statistics.median(found)
        print(f"compiled, {name}: {median * 1e3:.1f} ms, {median / plain:.2f} of float32")
    for name in ("float32", "bfloat16"):
        run = run_of(policies[name], False)
        run()
        start = time.perf_counter()
        run()
        print(f"eager, {name}: {(time.perf_counter() - start) * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
