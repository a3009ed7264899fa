"""A run on many ranks: they agree on what they do, the first one writes and speaks."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

import functrain as ft
from functrain.recipes import architectures
from functrain.recipes.config import Config, mesh_of
from functrain.train.watching import Row


def plan_of(config: Config, device: torch.device) -> ft.sharding.Plan | None:
    """Return how a run is spread over the ranks that torchrun has started; None for one process.

    Raises: ValueError for a mesh of another number of ranks.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    mesh = mesh_of(config.mesh, ranks)
    return None if ranks == 1 and mesh == {"data": 1} else plan_on(config, mesh, device)


def plan_on(config: Config, mesh: Mapping[str, int], device: torch.device) -> ft.sharding.Plan:
    """Return how a run is spread over a mesh; with an axis for tensors, tokens are split along it where they divide."""
    axes = {axis: axis for axis in ("fsdp", "tensor") if axis in mesh}
    rules = architectures.of(config.model).module.sharding(**axes)
    tensor, experts = axes.get("tensor"), getattr(config.model, "experts", "none")
    stream = tensor is not None and experts == "none" and config.model.context % mesh["tensor"] == 0
    return ft.sharding.Plan(mesh, rules, tensor=tensor, stream=stream, device=device.type)


def slices_of(config: Config, plan: ft.sharding.Plan | None) -> int:
    """Return how many parts a rank cuts its rows into, for as many in all as the config says, or a few more.

    Raises: ValueError for a batch that has not a row for each.
    """
    ranks = 1 if plan is None else plan.ranks
    each = -(-config.accumulate // ranks)
    if each * ranks > config.batch:
        raise ValueError(
            f"batch: expected at least {each * ranks} rows, {each} for each of {ranks} ranks, came {config.batch}"
        )
    return each


class Quiet:
    """What the other ranks show."""

    def begin(self, done: int, steps: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def row(self, row: Row) -> None:
        pass

    def evaluating(self, done: int, batches: int | None) -> None:
        pass

    def end(self) -> None:
        pass
