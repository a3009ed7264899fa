"""Train on two processes as one: `python two_ranks.py RANK WORLD RUN STEPS`; rank 0 saves and prints each step.

The parameter is a fingerprint of every sample in the order of its batch, gathered from all ranks.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed

import functrain as ft

IDS = ft.random.randint(ft.random.key(1), (400,), 0, 64)


def step(state: ft.TrainState, batch: Any) -> Any:
    rows = batch["tokens"]  # (B or B // world, T)
    if distributed.is_initialized():
        sizes = [torch.zeros((), dtype=torch.int64) for _ in range(distributed.get_world_size())]
        distributed.all_gather(sizes, torch.tensor(len(rows)))
        parts = [torch.zeros(int(size), rows.shape[1], dtype=rows.dtype) for size in sizes]
        for rank, part in enumerate(parts):
            distributed.broadcast(part.copy_(rows) if rank == distributed.get_rank() else part, rank)
        rows = torch.cat(parts)
    mixed = state.params
    for token in rows.flatten().tolist():
        mixed = (mixed * 31 + token) % 1_000_003
    return state._replace(step=state.step + 1, params=mixed), {}


def train(rank: int, world: int, run: Path, steps: int) -> ft.TrainState:
    batches: Any = ft.data.windows(IDS, batch=5, context=8, seed=0)
    if world > 1:
        batches = ft.data.shard(batches, rank=rank, world=world)
    key = torch.zeros(2, dtype=torch.int32)
    state = ft.TrainState(torch.tensor(0), torch.tensor(0), (), key)
    state = ft.checkpoint.resume(run, state)

    def show(t: int, state: Any, metrics: Any) -> None:
        print(t, flush=True)

    hooks: list[Any] = [show] if rank else [show, ft.checkpoint.every(100, run)]
    return ft.fit(step, state, batches, steps=steps, every=hooks)


if __name__ == "__main__":
    rank, world, run, steps = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    meeting = f"file://{run}.meeting"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    train(rank, world, run, steps)
