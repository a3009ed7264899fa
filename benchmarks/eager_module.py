"""Seconds of an eager training step of a module: `from_module` and `train_step`, beside torch's own loop.

    python benchmarks/eager_module.py [--only cnn|resnet] [--rounds 15] [--profile]

Both take the same module, AdamW and batches, in one process and in turns, round by round; medians of the rounds, of the
clock and of CPU time, which a busy host does not lengthen. The loop of torch is `zero_grad`, loss, `backward`, and
`torch.optim.AdamW(foreach=True)`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import functrain as ft


class Block(nn.Module):
    """The basic block of a ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.down = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(h)) + self.down(x))


def resnet(width: int = 16) -> nn.Module:
    """ResNet-18 for small images, narrow: 62 parameters, as many layers as the original."""
    sizes = [(width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2), (4 * width, 8 * width, 2)]
    blocks = [b for i, o, s in sizes for b in (Block(i, o, s), Block(o, o, 1))]
    first = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10))


def cnn() -> nn.Module:
    """Three convolutions with batch norms, 14 parameters."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def wide_head() -> nn.Module:
    """Two convolutions with batch norms and a hidden layer of a million parameters, as in tutorials on MNIST."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 49, 512), nn.ReLU(), nn.Linear(512, 10))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "cnn": (cnn, (16, 3, 32, 32)),
    "wide head": (wide_head, (16, 1, 28, 28)),
    "resnet": (resnet, (8, 3, 32, 32)),
    "resnet, 11 M": (lambda: resnet(64), (2, 3, 16, 16)),
}


def by_torch(module: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=1e-4, foreach=True)

    def step() -> Any:
        optimizer.zero_grad()
        loss = F.cross_entropy(module(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return step


def by_functrain(module: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    made = ft.from_module(module)

    def loss_fn(params: Any, buffers: Any, batch: Any, key: Any) -> Any:
        logits, buffers = made.apply(params, buffers, key, batch["x"])
        return F.cross_entropy(logits, batch["y"]), buffers

    tx = ft.optim.adamw(1e-3)
    train_step = ft.train_step(loss_fn, tx, buffers=True)
    state = ft.init_state(made.params, tx, key=ft.random.key(0), buffers=made.buffers)

    def step() -> Any:
        nonlocal state
        state, metrics = train_step(state, {"x": x, "y": y})
        return metrics["loss"]

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(CASES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--profile", action="store_true", help="print where the time of our step goes")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, AdamW, medians of {options.rounds} rounds")
    print("\n| | parameters | torch ms | functrain ms | ratio | of CPU time |\n|---|---|---|---|---|---|")
    for name, (make, shape) in CASES.items():
        if options.only not in (None, name):
            continue
        torch.manual_seed(0)
        module, x, y = make(), torch.randn(shape), torch.randint(0, 10, shape[:1])
        ours, theirs = by_functrain(module, x, y), by_torch(copy.deepcopy(module), x, y)
        for _ in range(3):
            torch.testing.assert_close(ours(), theirs().detach(), rtol=1e-3, atol=1e-3)
        seconds: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
        for _ in range(options.rounds):
            for who, step in (("ours", ours), ("theirs", theirs)):
                start, busy = time.perf_counter(), time.process_time()
                step()
                seconds[who].append((time.perf_counter() - start, time.process_time() - busy))
        (a, cpu_a), (b, cpu_b) = (
            [1e3 * statistics.median(row[i] for row in seconds[who]) for i in (0, 1)] for who in ("theirs", "ours")
        )
        count = len(list(module.parameters()))
        size = sum(p.numel() for p in module.parameters())
        print(f"| {name} | {count}, {size:,} | {a:.1f} | {b:.1f} | {b / a:.2f} | {cpu_b / cpu_a:.2f} |", flush=True)
        if options.profile:
            _profile(ours)


def _profile(step: Callable[[], Any]) -> None:
    import cProfile
    import pstats

    profile = cProfile.Profile()
    profile.enable()
    for _ in range(5):
        step()
    profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    pstats.Stats(profile).sort_stats("cumulative").print_stats(45)


if __name__ == "__main__":
    main()
