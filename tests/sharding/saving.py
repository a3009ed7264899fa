"""What ranks save and load: `test_checkpoints_of_parts` runs these."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import steps
import torch
from torch.distributed.tensor import DTensor, Partial

import functrain as ft
from functrain.checkpoint import stream

RULES = [
    ("empty/*", ft.sharding.P(None, "fsdp")),
    ("grouped", ft.sharding.P(ft.sharding.parts("fsdp", 3))),
    ("rows/*", ft.sharding.P("fsdp")),
    ("columns", ft.sharding.P(None, "fsdp")),
    ("**", ft.sharding.P()),
]


def values() -> Any:
    """Return a tree of many kinds of leaves, whole."""
    key = ft.random.key(7)
    table = ft.random.normal(key, (8, 12)).double()
    return {
        "rows": {"a": table, "half": table[:, :3].bfloat16(), "count": torch.arange(8), "tied": table},
        "columns": ft.random.normal(ft.random.fold_in(key, 1), (12, 8)).mT.contiguous().mT,
        "empty": {"split": torch.zeros(0, 8)},
        "grouped": torch.arange(24.0).reshape(12, 2),
        "whole": torch.tensor([[1.0, float("nan")], [float("inf"), -0.0]]).mT,
        "step": 7,
        "name": "x",
        "none": None,
    }


def same_bits(found: Any, wanted: Any) -> None:
    for (path, a), (other, b) in zip(ft.tree.items(found), ft.tree.items(wanted), strict=True):
        assert path == other
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and a.shape == b.shape, path
            assert torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)), (
                path
            )
        else:
            assert a == b, path


def plan_of(mesh: dict[str, int], rules: Any = RULES) -> ft.sharding.Plan:
    return ft.sharding.Plan(mesh, rules, device="cpu")


def sharded(plan: ft.sharding.Plan) -> Any:
    tensors, rest = {}, {}
    for name, value in values().items():
        (tensors if isinstance(value, dict | torch.Tensor) else rest)[name] = value
    found = plan.shard(tensors)
    found["rows"]["tied"] = found["rows"]["a"]
    old = found["columns"]
    if hasattr(old, "to_local"):  # in another order of memory, as an optimizer may leave it
        found["columns"] = DTensor.from_local(
            old.to_local().mT.contiguous().mT, old.device_mesh, old.placements, run_check=False, shape=old.shape,
            stride=(1, 12),
        )  # fmt: skip
    return found | rest


def save(mesh: dict[str, int], folder: str, max_file_bytes: int = 2**30) -> None:
    plan = plan_of(mesh)
    ft.checkpoint.save(folder, sharded(plan), plan=plan, max_file_bytes=max_file_bytes, metadata={"x": 1})


def move(mesh: dict[str, int], source: str, target: str) -> Any:
    """Load on a mesh, save again, and return the whole of it."""
    plan = plan_of(mesh)
    like = ft.tree.map(lambda leaf: leaf * 0 if isinstance(leaf, torch.Tensor) else leaf, sharded(plan))
    found = ft.checkpoint.load(source, like=like, plan=plan)
    assert found["rows"]["a"] is found["rows"]["tied"] or plan.ranks == 1
    assert found["columns"].to_local().stride()[0] == 1
    for old, new in zip(ft.tree.leaves(like), ft.tree.leaves(found), strict=True):
        assert type(old) is type(new) and getattr(old, "placements", None) == getattr(new, "placements", None)
    ft.checkpoint.save(target, found, plan=plan, metadata={"x": 1})
    return plan.whole(found)


def bytes_read(mesh: dict[str, int], folder: str) -> int:
    """Return how many bytes of tensors this rank reads."""
    plan, seen, real = plan_of(mesh, [("**", ft.sharding.largest("fsdp"))]), [0], os.readv

    def readv(fd: int, rooms: Any) -> int:
        count = real(fd, rooms)
        seen[0] += count
        return count

    like = plan.shard({"w": torch.zeros(64, 1024), "v": torch.zeros(8, 4096)})
    stream.os.readv = readv  # type: ignore[attr-defined]
    try:
        found = ft.checkpoint.load(folder, like=like, verify=False)
    finally:
        stream.os.readv = real  # type: ignore[attr-defined]
    whole = plan.whole(found)
    assert torch.equal(whole["w"], torch.arange(64.0 * 1024).reshape(64, 1024))
    assert torch.equal(whole["v"], torch.arange(8.0 * 4096).reshape(8, 4096))
    return seen[0]


def trained(
    mesh: dict[str, int], run: str, steps_: int, n: int = 2, asynchronous: bool = False, resume: bool = True
) -> Any:
    """Train with checkpoints up to a step, from the newest one; return the whole state, and what was resumed."""
    plan = ft.sharding.Plan(mesh, [("**", ft.sharding.largest("fsdp"))], device="cpu")
    step = ft.train_step(steps.loss_fn, steps.optimizer(), plan=plan)
    state = ft.init_state(plan.shard(steps.params()), steps.optimizer(), key=ft.random.key(3))
    if resume:
        state = ft.checkpoint.resume(run, like=state, metadata={"a": 1}, plan=plan)
    begun = int(state.step)
    hooks = [
        ft.checkpoint.every(
            n, run, plan=plan, metadata={"a": 1}, asynchronous=asynchronous,
            keep_best=ft.checkpoint.Best("seen"),
        )
    ]  # fmt: skip

    def seen(t: int, state: Any, metrics: Any) -> Any:
        return {"seen": float((t * 7) % 5)}

    batches = ft.data.shard(steps.batches(), plan=plan)
    state = ft.fit(step, state, [batches[t % 3] for t in range(steps_)], steps=steps_, every=[seen, *hooks])
    return plan.whole(state), begun


def failing(mesh: dict[str, int], folder: str, how: str) -> str:
    """Save where the last rank fails; return what this rank says."""
    plan = plan_of(mesh)
    tree, real = sharded(plan), os.fsync
    last = plan.mesh.rank == plan.mesh.world - 1
    if how == "leaf" and last:
        tree["name"] = object()
    if how == "disk" and last:

        def fsync(fd: int) -> None:
            raise OSError(28, "No space left on device")

        os.fsync = fsync
    try:
        ft.checkpoint.save(folder, tree, plan=plan)
    except ft.checkpoint.CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        os.fsync = real
    return ""


def refused(mesh: dict[str, int], folder: str) -> list[str]:
    """Return what is said of split leaves without a plan, of other placements, and of a broken checkpoint."""
    plan, said = plan_of(mesh), []
    tree = sharded(plan)
    partial = DTensor.from_local(torch.ones(3), plan.mesh.devices, [Partial()] * len(mesh))
    for work in (
        lambda: ft.checkpoint.save(f"{folder}/none", tree),
        lambda: ft.checkpoint.save(f"{folder}/partial", {"a": {"b": partial}}, plan=plan),
        lambda: ft.checkpoint.load(f"{folder}/broken", like=tree, plan=plan),
        lambda: ft.checkpoint.latest(f"{folder}/run", plan=plan),
    ):
        try:
            work()
            said.append("")
        except ft.checkpoint.CheckpointError as error:
            said.append(f"{type(error).__name__}: {error}")
    assert not Path(folder, "none").exists() and not Path(folder, "partial").exists()
    return said


def bytes_of_rows(folder: str) -> None:
    """Of what one process has saved, four ranks that split it by rows read a quarter each."""
    plan = plan_of({"fsdp": 4}, [("**", ft.sharding.P("fsdp"))])
    whole = {"w": torch.arange(1024.0 * 64).reshape(1024, 64)}
    if plan.rank == 0:
        ft.checkpoint.save(folder, whole)
    torch.distributed.barrier()
    seen, real = [0], os.readv

    def readv(fd: int, rooms: Any) -> int:
        count = real(fd, rooms)
        seen[0] += count
        return count

    like = plan.shard(ft.tree.map(torch.zeros_like, whole))
    stream.os.readv = readv  # type: ignore[attr-defined]
    try:
        found = ft.checkpoint.load(folder, like=like, verify=False)
    finally:
        stream.os.readv = real  # type: ignore[attr-defined]
    assert whole["w"].nbytes // 4 < seen[0] < whole["w"].nbytes // 4 + 5000, seen
    assert torch.equal(plan.whole(found)["w"], whole["w"])
