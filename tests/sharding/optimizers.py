"""Optimizers over leaves that are split over two ranks, and over whole ones."""

from __future__ import annotations

from typing import Any

import torch

import functrain as ft
from functrain.sharding import pieces

NAMES = [
    "adabelief", "adafactor", "adagrad", "adam", "adamax", "adamw", "adan", "fromage", "lamb", "lars", "lion", "muon",
    "nadam", "novograd", "radam", "rmsprop", "sgd", "sm3", "yogi",
]  # fmt: skip


def differences() -> dict[str, float]:
    """Return how far the params are apart after three steps."""
    plan = ft.sharding.Plan({"fsdp": 2}, [("**", ft.sharding.largest("fsdp"))], device="cpu")
    key = ft.random.key(0)
    whole = {"matrix": ft.random.normal(key, (8, 6)).double(), "vector": ft.random.normal(key, (4,)).double()}

    def trained(name: str, params: Any, split: bool) -> Any:
        optimizer: Any = getattr(ft.optim, name)(1e-2)
        with pieces.replicating():
            state = optimizer.init(params)
            for t in range(3):
                grads = ft.tree.map(lambda x, t=t: torch.cos(3 * x + t), whole)
                updates, new = optimizer.update(plan.shard(grads) if split else grads, state, params)
                params = pieces.placed_like(ft.optim.apply_updates(params, updates), params)
                assert all(map(pieces.is_split, params.values())) == split
                state = pieces.placed_like(new, state)
        return plan.whole(params)

    def apart(name: str) -> float:
        one, other = trained(name, whole, False), trained(name, plan.shard(whole), True)
        return max((one[path] - other[path]).abs().max().item() for path in whole)

    return {name: apart(name) for name in NAMES}
