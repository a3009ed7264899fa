"""Ranks of one process: a tensor is what each of them has, and collectives are what they are defined to be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from functrain import tree
from functrain.sharding import Plan, pieces
from functrain.sharding.mesh import named
from functrain.sharding.placement import part, resolved


@contextmanager
def simulated(world: int) -> Iterator[Any]:
    """Run every operation inside once for each of so many ranks; enter it in a rehearsal's `pretended`."""
    # torch's own mode for tests of what it splits: DTensor computes in it
    from torch.distributed._local_tensor import LocalTensorMode

    with LocalTensorMode(world) as mode, _Defined():
        yield mode


def parts(params: tree.Tree, plan: Plan) -> tree.Tree:
    """Return what `plan.shard(params)` is on each rank."""
    from torch.distributed.tensor import DTensor

    dims, mesh = resolved(params, plan.rules, plan.mesh), plan.mesh

    def one(path: str, leaf: Tensor) -> Tensor:
        if all(mesh.size(axes) == 1 for axes in dims[path]):
            return on_ranks(mesh.world, lambda rank: leaf.clone())
        here = on_ranks(mesh.world, lambda rank: part(leaf, dims[path], mesh, rank))
        found: Tensor = DTensor.from_local(
            here, mesh.devices, pieces.placements(dims[path], mesh), run_check=False,
            shape=leaf.shape, stride=leaf.new_empty(leaf.shape, device="meta").stride(),
        )  # fmt: skip
        return found

    return tree.map_with_path(one, params)


def on_ranks(world: int, of: Callable[[int], Tensor]) -> Tensor:
    """Return a tensor that is `of(rank)` on each rank."""
    from torch.distributed._local_tensor import LocalTensor

    return LocalTensor({rank: of(rank) for rank in range(world)})


def on_rank(x: Tensor, rank: int) -> Tensor:
    """Return what a rank has; what was made outside is alike on all."""
    every = getattr(x, "_local_tensors", None)
    return x if every is None else every[rank]


class _Defined(TorchDispatchMode):
    """The operations of `functrain.sharding.operations` on what all ranks have."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "functrain_ranks":
            return func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2].partition(".")[0]
        if name == "finish":  # what was begun is there
            return list(args[0])
        *given, mesh, axes = args
        found: dict[int, Tensor] = {}
        for row in named(mesh).ranks(axes.split(",")):
            found |= dict(zip(row, _of_row(name, given, row), strict=True))
        return [on_ranks(len(found), found.__getitem__)]


def _of_row(name: str, given: Sequence[Any], row: Sequence[int]) -> list[Tensor]:
    """Return what a collective gives to each of the ranks of a row."""
    count, first = len(row), given[0]
    if name == "begin_sum":
        flat = [torch.cat([on_rank(x, rank).reshape(-1) for x in first]) for rank in row]
        return [torch.stack(flat).sum(0) for _ in row]
    xs, numbers = [on_rank(first, rank) for rank in row], given[1:]
    if name == "place":
        return [torch.tensor(i, device=x.device) for i, x in enumerate(xs)]
    if name == "gather":
        return [torch.cat(xs, *numbers) for _ in row]
    if name == "scatter":
        return [x.contiguous() for x in torch.stack(xs).sum(0).chunk(count, *numbers)]
    if name == "shift":
        (by,) = numbers
        return [xs[(i - by) % count].clone() for i in range(count)]
    assert name == "exchange", name
    split, joined = numbers
    return [torch.cat([x.chunk(count, split)[i] for x in xs], joined) for i in range(count)]
