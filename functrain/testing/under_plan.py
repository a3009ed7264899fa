"""Whether a loss means the same on one process and spread over many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from functrain import data, optim, random, tree
from functrain.sharding import Plan
from functrain.sharding.pieces import is_split
from functrain.sharding.rehearsal import pretended
from functrain.testing.simulated import on_rank, on_ranks, parts, simulated
from functrain.train import init_state, train_step
from functrain.tree import Batch, Params

_SHOWN = 8  # leaves in one message


def assert_same_under_plan(
    loss_fn: Any,
    params: Params,
    batch: Batch,
    plan: Mapping[str, Any],
    *,
    optimizer: optim.GradientTransformation | None = None,
    key: Tensor | None = None,
    accumulate: int = 1,
    steps: int = 2,
    rtol: float = 1e-9,
) -> None:
    """Assert that a step on many ranks is the step of one process: params, the optimizer's state, and all metrics.

    The ranks are simulated in this process: no torchrun, no other device. `plan` is what `ft.sharding.Plan` is called
    with, such as `{"mesh": {"fsdp": 2}, "params": rules}`; `ft.testing.strategies.plans(params)` draws it. Params and
    batches of floating-point numbers are cast to float64, so that what differs is no rounding, and `rtol` times the
    largest element of a leaf, or times 1, is what may; give a larger one for a loss that computes in float32. n ranks
    of k slices (`accumulate`) are compared with one process of n * k slices, whose random numbers are theirs; and where
    another key makes no other loss, with the whole batch at once. By default the optimizer clips by the global norm,
    and has momentum.

    It sees, in a loss of yours that draws nothing, a mean where a sum was meant and rows that depend on each other; and
    in any, random numbers that are not of the key, and rules for a layer that cannot compute with parts.

    Shapes: every leaf of the batch is (B, ...), and B divides by n * k.
    Raises: AssertionError naming what differs, on which rank, and by how much; ValueError for rows that do not divide;
    RuntimeError where torch.distributed runs; and what the plan and the step raise.

    >>> def loss_fn(params, batch, key):
    ...     wrong = (batch["x"] @ params["w"] - batch["y"]) ** 2
    ...     return ft.Loss(wrong.sum(), wrong.new_tensor(wrong.numel()), {})
    >>> batch = {"x": torch.randn(4, 2), "y": torch.randn(4)}
    >>> plan = {"mesh": {"fsdp": 2}, "params": [("w", ft.sharding.P("fsdp"))]}
    >>> ft.testing.assert_same_under_plan(loss_fn, {"w": torch.ones(2)}, batch, plan)
    """
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(0.1, momentum=0.9)) if optimizer is None else optimizer
    key = random.key(0) if key is None else key
    params, batch = tree.cast(params, torch.float64), tree.cast(batch, torch.float64)
    world = 1
    for size in plan["mesh"].values():
        world *= size
    with pretended(world):
        made = Plan(device="cpu", **plan)
        ranks = made.ranks
        uneven = [path for path, leaf in tree.items(batch) if leaf.dim() == 0 or len(leaf) % (ranks * accumulate)]
        if uneven:
            raise ValueError(
                f"assert_same_under_plan: {uneven[0]}: expected rows that divide into {ranks} ranks of {accumulate} "
                f"slices, came {tuple(tree.at(batch, uneven[0]).shape)}"
            )
        draws = not _equal(loss_fn(params, batch, key), loss_fn(params, batch, random.fold_in(key, 1)))
        counts = {ranks * accumulate} if draws else {ranks * accumulate, 1}
        alone = [train_step(loss_fn, tx, accumulate=count) for count in sorted(counts)]
        want = [init_state(params, tx, key=key) for _ in alone]
        spread = train_step(loss_fn, tx, accumulate=accumulate, plan=made)
        _ = made.mesh.devices  # has values, in every rank the same
        rows = [data.shard([batch], rank=rank, world=ranks, accumulate=accumulate)[0] for rank in range(ranks)]
        with simulated(world) as mode:
            with mode.disable():
                here = parts(params, made)
                own = [made.mesh.index(made.batch, rank) if made.batch else 0 for rank in range(world)]
                split = tree.map(lambda *leaves: on_ranks(world, lambda rank: leaves[own[rank]]), *rows)
            found = init_state(here, tx, key=key)
            for number in range(steps):
                found, metrics = spread(found, split)
                whole = tree.map(lambda x: x.full_tensor() if is_split(x) else x, (found, metrics))
                with mode.disable():
                    for i, step in enumerate(alone):
                        want[i], measured = step(want[i], batch)
                        _check(whole, (want[i], measured), f"step {number}", world, rtol)


def _equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


def _check(found: Any, want: Any, when: str, world: int, rtol: float) -> None:
    said = []
    for path, x, wanted in zip(tree.paths(want), tree.leaves(found), tree.leaves(want), strict=True):
        scale = max(1.0, float(wanted.abs().max())) if wanted.numel() and wanted.is_floating_point() else 0.0
        for rank in range(world):
            here = on_rank(x, rank)
            off = float((here.double() - wanted.double()).abs().max()) if wanted.numel() else 0.0
            if not off <= rtol * scale:
                said.append(f"  {path.removeprefix('0/').removeprefix('1/')} on rank {rank}: off by {off:.3g}")
                break
    if said:
        more = [f"  and {len(said) - _SHOWN} other leaves"] if len(said) > _SHOWN else []
        raise AssertionError(
            "\n".join(
                [
                    f"assert_same_under_plan: {when} is not that of one process:",
                    *said[:_SHOWN],
                    *more,
                    "  way out: return a Loss of sums and their weight, draw from the key, take no rows together; a "
                    "layer of yours computes with whole leaves unless its rules say otherwise",
                ]
            )
        )
