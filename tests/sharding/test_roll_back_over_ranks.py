"""Ranks go back to their last checkpoint together, and leave out the same batches, as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import steps
import torch
from ranks import Ranks

import functrain as ft


class Batches:
    """Batches whose last row is not finite where `bad` has their number: of two ranks, the last one's."""

    def __init__(self, bad: range) -> None:
        self.good, self.bad = steps.batches(), bad

    def __getitem__(self, t: int) -> Any:
        batch = {name: leaf.clone() for name, leaf in self.good[t % 3].items()}
        if t in self.bad:
            batch["x"][-1], batch["mask"][-1] = float("inf"), True
        return batch


def rolled_back(folder: str, mesh: dict[str, int]) -> Any:
    """Train for 12 steps with three bad batches in a row, and a checkpoint every 5 steps."""
    ranks = next(iter(mesh.values()))
    rules = [("in", ft.sharding.P("fsdp")), ("**", ft.sharding.P())] if "fsdp" in mesh else [("**", ft.sharding.P())]
    plan = ft.sharding.Plan(mesh, rules, device="cpu") if ranks > 1 else None
    guard = ft.train.skip_nonfinite()
    accumulate = 1 if plan is not None else 2
    step = ft.train_step(steps.loss_fn, steps.optimizer(), guard=guard, plan=plan, accumulate=accumulate)
    params = steps.params() if plan is None else plan.shard(steps.params())
    state = ft.init_state(params, steps.optimizer(), key=ft.random.key(3), guard=guard)
    saves = ft.checkpoint.every(5, folder, plan=plan)
    batches: Any = Batches(range(7, 10))
    batches = batches if plan is None else ft.data.shard(batches, plan=plan)
    state = ft.fit(step, state, batches, steps=12, every=[ft.train.roll_back(saves, after=3)])
    assert torch.is_tensor(state.guard.left_out)
    split = hasattr(state.params["in"], "to_local")
    return (state if plan is None else plan.whole(state)), split


def test_ranks_go_back_together_as_one_process_does(two: Ranks, tmp_path: Path) -> None:
    alone, _ = rolled_back(str(tmp_path / "alone"), {"data": 1})
    assert alone.guard.rolled_back == 1 and alone.guard.left_out == 5
    for axis in ("data", "fsdp"):
        for found, split in two.run(rolled_back, str(tmp_path / axis), {axis: 2}):
            assert split == (axis == "fsdp")
            ft.testing.assert_trees_close(found, alone, rtol=1e-9, atol=1e-12)
        assert len(ft.checkpoint.list(tmp_path / axis)) == len(ft.checkpoint.list(tmp_path / "alone"))
