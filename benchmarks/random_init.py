"""Time drawing N uniform and N normal float32 numbers, eager, beside torch.randn on the same machine.

python benchmarks/random_init.py [N]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import functrain as ft


def main() -> None:
    n = int(float(sys.argv[1])) if len(sys.argv) > 1 else 100_000_000
    key = ft.random.key(0)
    print(f"{n:,} float32 numbers, eager, {torch.get_num_threads()} threads")
    report("ft.random.uniform", n, lambda: ft.random.uniform(key, (n,)))
    report("ft.random.normal", n, lambda: ft.random.normal(key, (n,)))
    report("torch.randn", n, lambda: torch.randn(n))


def report(name: str, n: int, draw: Callable[[], Tensor]) -> None:
    # processor time too: it stays the same while others use the machine
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    draw()
    wall, cpu = time.perf_counter() - wall_start, time.process_time() - cpu_start
    print(f"{name:18s} {wall:6.2f} s wall  {cpu:6.2f} s processor  {wall / n * 1e9:6.1f} ns an element")


if __name__ == "__main__":
    main()
