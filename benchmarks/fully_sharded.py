"""Time and memory of a step with split params on several ranks, beside torch's `fully_shard` with fused AdamW.

    python -m torch.distributed.run --nproc-per-node 2 benchmarks/fully_sharded.py [--only wide|deep] [--rounds 11]

Every rank has one thread, rows of its own, and a part of params, gradients and moments. Each step clips by global norm
and runs AdamW. `fully_shard` is put around each block and the whole, compiled: each block by torch.compile, as
torchtitan does. The variants take turns, all ranks together; printed by rank 0 are medians over the rounds, the median
of the ratios to the compiled peer in the same round, and what torch's allocator held at most in a step, state included.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from data_parallel import ROWS, SHAPES, measured_on_ranks, turns
from modules import GPT, stepper
from step import optimizer
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile

import functrain as ft
from functrain.models import gpt2

PEER = "fully_shard(compiled blocks)"


def variants(shape: dict[str, int], plan: Any, cache: Path) -> dict[str, tuple[Callable[[], Any], int]]:
    """Return each step with the bytes of its params and moments on this rank."""
    torch.manual_seed(0)
    tokens = torch.randint(shape["vocab"], (plan.ranks * ROWS, shape["context"] + 1))
    mine = tokens[plan.rank * ROWS : (plan.rank + 1) * ROWS]
    inputs, targets = mine[:, :-1].contiguous(), mine[:, 1:].contiguous()
    config = gpt2.Config(**shape)

    def loss_fn(params: Any, batch: Any, key: Any) -> Any:
        hidden = gpt2.hidden(params, batch["tokens"], config, key=key)
        return ft.losses.next_token_from_hidden(hidden, params["wte"], batch["targets"])

    def ours(compiled: bool, recompute: bool = False) -> tuple[Callable[[], Any], int]:
        loss = ft.recompute_layers(loss_fn) if recompute else loss_fn
        step: Any = ft.train_step(loss, optimizer(), plan=plan)
        step = ft.compile(step, donate=True, cache=cache) if compiled else step
        key = ft.random.key(0)
        state = ft.init_state(plan.shard(gpt2.init(config, key)), optimizer(), key=key)
        held = sum(here(leaf).nbytes for leaf in ft.tree.leaves(state))

        def run() -> Any:
            nonlocal state
            state, metrics = step(state, {"tokens": inputs, "targets": targets})
            return metrics["loss"].item()

        return run, held

    def theirs(compiled: bool) -> tuple[Callable[[], Any], int]:
        module = GPT(**shape)
        for block in module.blocks:
            if compiled:
                block.compile()
            fully_shard(block, mesh=plan.mesh.devices)
        fully_shard(module, mesh=plan.mesh.devices)
        step = stepper(module, bf16=False)
        held = 3 * sum(here(leaf.detach()).nbytes for leaf in module.parameters())
        return lambda: step(inputs, targets).item(), held

    return {
        "fully_shard, eager": theirs(False),
        PEER: theirs(True),
        "functrain, eager": ours(False),
        "functrain, compiled, donated": ours(True),
        "functrain, compiled, donated, layers recomputed": ours(True, recompute=True),
    }


def here(leaf: Any) -> torch.Tensor:
    found: torch.Tensor = leaf.to_local() if hasattr(leaf, "to_local") else leaf
    return found


def peak_of(run: Callable[[], Any]) -> int:
    """Return the most bytes that a step holds beside what was held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    live = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def measure(name: str, plan: Any, rounds: int, cache: Path) -> None:
    found = variants(SHAPES[name], plan, cache)
    peaks = {}
    for which, (run, held) in found.items():
        for _ in range(3):
            run()
        distributed.barrier()
        # the least: a thread of gloo's may let go of what was sent later than the step does
        peaks[which] = held + min(peak_of(run) for _ in range(3))
        distributed.barrier()
    times = turns({which: run for which, (run, _) in found.items()}, rounds)
    if plan.rank == 0:
        shape = ", ".join(f"{key} {value}" for key, value in SHAPES[name].items())
        print(
            f"\nGPT, {shape}, {plan.ranks} ranks of {ROWS} rows\n\n"
            "| step | ms, median | spread | ratio | peak MiB | ratio |\n|---|---|---|---|---|---|"
        )
        for which, each in times.items():
            ratio = statistics.median(a / b for a, b in zip(each, times[PEER], strict=True))
            print(
                f"| {which} | {statistics.median(each) * 1e3:.4g} | {min(each) * 1e3:.3g}-{max(each) * 1e3:.3g} "
                f"| {ratio:.3f} | {peaks[which] / 2**20:.1f} | {peaks[which] / peaks[PEER]:.3f} |",
                flush=True,
            )


def main() -> None:
    rules = [("**", ft.sharding.largest("fsdp"))]
    measured_on_ranks(__doc__ or "", lambda ranks: ft.sharding.Plan({"fsdp": ranks}, rules, device="cpu"), measure)


if __name__ == "__main__":
    main()
