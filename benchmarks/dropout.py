"""Time and memory of dropout from a key, beside torch.nn.functional.dropout.

    python benchmarks/dropout.py [--rounds 15]

"alone" is dropout and its gradient. "in a network" is the gradient of four layers `dropout(tanh(x @ w))`: there a
program without dropout says what dropout adds. Peak is what torch's allocator held at most in one call, above what it
held before. Variants take turns, round by round, in one process; times are medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from step import peak_bytes, seconds_by_turns
from torch import Tensor

import functrain as ft
from functrain.compiler import compilation

KEY, RATE, LAYERS, WIDTH = ft.random.key(0), 0.1, 4, 256
Run = Callable[[], Any]


def alone(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Run]:
    x, slope = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)

    def keyed(x: Tensor, slope: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        dropped = ft.nn.dropout(x, RATE, key)
        return torch.sum(dropped * slope), dropped

    def plain(x: Tensor) -> Tensor:
        return F.dropout(x, RATE)

    def by_autograd(fn: Callable[[Tensor], Tensor]) -> Run:
        leaf = x.clone().requires_grad_()
        return lambda: torch.autograd.grad(fn(leaf), leaf, slope)

    one = ft.compile(ft.grad(keyed, has_aux=True))
    return {
        "F.dropout, eager": by_autograd(plain),
        "F.dropout, torch.compile": by_autograd(torch.compile(plain, fullgraph=True, dynamic=False)),
        "ft.nn.dropout, ft.compile": lambda: one(x, slope, KEY),
    }


def network(rows: int, dtype: torch.dtype) -> dict[str, Run]:
    x = torch.randn(rows, WIDTH).to(dtype)
    weights = [(torch.randn(WIDTH, WIDTH) / WIDTH**0.5).to(dtype) for _ in range(LAYERS)]

    def loss(drop: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def of(weights: Any, x: Tensor, key: Tensor) -> Tensor:
            for i, weight in enumerate(weights):
                x = drop(torch.tanh(x @ weight), key, i)
            return torch.sum(x.float() ** 2)

        return of

    none, torchs = loss(lambda x, key, i: x), loss(lambda x, key, i: F.dropout(x, RATE))
    keyed = loss(lambda x, key, i: ft.nn.dropout(x, RATE, ft.random.fold_in(key, i)))
    leaves = [weight.clone().requires_grad_() for weight in weights]
    compiled = torch.compile(torchs, fullgraph=True, dynamic=False)
    whole, pieces, without = gradient_of(keyed, 2**62), gradient_of(keyed, 0), gradient_of(none, 0)
    return {
        "no dropout, ft.compile in pieces": lambda: without(weights, x, KEY),
        "F.dropout, eager": lambda: torch.autograd.grad(torchs(leaves, x, KEY), leaves),
        "F.dropout, torch.compile": lambda: torch.autograd.grad(compiled(leaves, x, KEY), leaves),
        "ft.nn.dropout, ft.compile in pieces": lambda: pieces(weights, x, KEY),
        "ft.nn.dropout, ft.compile whole": lambda: whole(weights, x, KEY),
    }


def gradient_of(fn: Callable[..., Any], cut_at_bytes: int) -> Callable[..., Any]:
    """Compile as ft.compile does for params of more bytes, or of fewer: two programs, or one of both passes."""
    gradient = ft.compile(ft.grad(fn))

    def run(*args: Any) -> Any:
        with patch.object(compilation, "_PIECEWISE_BYTES", cut_at_bytes):  # read when a program is made
            return gradient(*args)

    return run


def measure(title: str, elements: int, variants: dict[str, Run], rounds: int) -> None:
    for run in variants.values():
        for _ in range(3):
            run()
    seconds = seconds_by_turns(variants, rounds)
    print(f"\n{title}\n\n| | ns an element | peak, bytes an element |\n|---|---|---|")
    for name, run in variants.items():
        ns = seconds[name] / elements * 1e9
        print(f"| {name} | {ns:.2f} | {peak_bytes(run) / elements:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, rate {RATE}")
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((16, 128, 64), (16, 128, 512), (64, 128, 1024)):
            elements = torch.Size(shape).numel()
            measure(f"alone, {shape}, {dtype}", elements, alone(shape, dtype), options.rounds)
        measure(f"in a network, {LAYERS} x (4096, {WIDTH}), {dtype}", LAYERS * 4096 * WIDTH, network(4096, dtype),
                options.rounds)  # fmt: skip


if __name__ == "__main__":
    main()
