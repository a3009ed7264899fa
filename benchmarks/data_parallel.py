"""Time of a data-parallel training step on several ranks, beside torch's DistributedDataParallel with fused AdamW.

    python -m torch.distributed.run --nproc-per-node 2 benchmarks/data_parallel.py [--only wide|deep] [--rounds 11]

Every rank has one thread, and rows of its own. Each step clips by global norm and runs AdamW. The variants take turns,
all ranks together; printed by rank 0 are medians over the rounds, and the median of the ratios to compiled DDP in the
same round.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from modules import GPT, stepper
from step import optimizer
from torch import distributed, nn

import functrain as ft
from functrain.models import gpt2

SHAPES = {
    "wide": {"vocab": 8192, "context": 128, "layers": 2, "heads": 8, "width": 512},
    "deep": {"vocab": 2048, "context": 128, "layers": 8, "heads": 4, "width": 256},
}
ROWS = 4  # of each rank


def variants(shape: dict[str, int], plan: Any, cache: Path) -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    tokens = torch.randint(shape["vocab"], (plan.ranks * ROWS, shape["context"] + 1))
    mine = tokens[plan.rank * ROWS : (plan.rank + 1) * ROWS]
    inputs, targets = mine[:, :-1].contiguous(), mine[:, 1:].contiguous()
    config = gpt2.Config(**shape)

    def loss_fn(params: Any, batch: Any, key: Any) -> Any:
        hidden = gpt2.hidden(params, batch["tokens"], config, key=key)
        return ft.losses.next_token_from_hidden(hidden, params["wte"], batch["targets"])

    def ours(compiled: bool) -> Callable[[], Any]:
        step: Any = ft.train_step(loss_fn, optimizer(), plan=plan)
        step = ft.compile(step, donate=True, cache=cache) if compiled else step
        key = ft.random.key(0)
        state = ft.init_state(gpt2.init(config, key), optimizer(), key=key)

        def run() -> Any:
            nonlocal state
            state, metrics = step(state, {"tokens": inputs, "targets": targets})
            return metrics["loss"].item()

        return run

    def theirs(wrap: Callable[[nn.Module], Any]) -> Callable[[], Any]:
        step = stepper(wrap(nn.parallel.DistributedDataParallel(GPT(**shape))), bf16=False)
        return lambda: step(inputs, targets).item()

    return {
        "DDP(module), eager": theirs(lambda module: module),
        "torch.compile(DDP(module))": theirs(torch.compile),
        "functrain, eager": ours(False),
        "functrain, compiled, donated": ours(True),
    }


def turns(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Run all in turn, round by round, all ranks together; return the seconds of each."""
    times: dict[str, list[float]] = {which: [] for which in runs}
    for _ in range(rounds):
        for which, run in runs.items():
            distributed.barrier()
            start = time.perf_counter()
            run()
            distributed.barrier()
            times[which].append(time.perf_counter() - start)
    return times


def measure(name: str, plan: Any, rounds: int, cache: Path) -> None:
    found = variants(SHAPES[name], plan, cache)
    for run in found.values():
        for _ in range(3):
            run()
        distributed.barrier()
    times = turns(found, rounds)
    if plan.rank == 0:
        peers = times["torch.compile(DDP(module))"]
        shape = ", ".join(f"{key} {value}" for key, value in SHAPES[name].items())
        print(
            f"\nGPT, {shape}, {plan.ranks} ranks of {ROWS} rows\n\n"
            "| step | ms, median | spread | ratio |\n|---|---|---|---|"
        )
        for which, each in times.items():
            ratio = statistics.median(a / b for a, b in zip(each, peers, strict=True))
            spread = f"{min(each) * 1e3:.3g}-{max(each) * 1e3:.3g}"
            print(f"| {which} | {statistics.median(each) * 1e3:.4g} | {spread} | {ratio:.3f} |", flush=True)


def main() -> None:
    measured_on_ranks(__doc__ or "", lambda ranks: ft.sharding.Plan({"data": ranks}, device="cpu"), measure)


def measured_on_ranks(doc: str, plan_of: Callable[[int], Any], measure: Callable[[str, Any, int, Path], None]) -> None:
    """Measure each shape on the ranks of torchrun, with a plan for their number."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(SHAPES))
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    plan = plan_of(distributed.get_world_size())
    folder = [tempfile.mkdtemp()]
    distributed.broadcast_object_list(folder)
    if plan.rank == 0:
        print(f"torch {torch.__version__}, {platform.machine()}, Python {platform.python_version()}")
    for name in SHAPES:
        if options.only in (None, name):
            measure(name, plan, options.rounds, Path(folder[0]) / name)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
