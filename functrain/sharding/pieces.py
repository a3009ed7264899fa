"""Leaves of which each rank has a part: DTensors outside of a loss, local tensors inside."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from torch import Tensor

from functrain import tree
from functrain.sharding.mesh import Mesh
from functrain.sharding.placement import Dims, Parts, part, parts


def is_split(leaf: Any) -> bool:
    """Tell whether a leaf is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # who has one has imported it, which takes half a second
    return module is not None and isinstance(leaf, module.DTensor)


def shard(params: tree.Tree, dims: Mapping[str, Dims], mesh: Mesh) -> tree.Tree:
    """Return a tree of DTensors, of which this rank keeps its part; what nothing splits stays a tensor."""
    from torch.distributed.tensor import DTensor

    def one(path: str, leaf: Tensor) -> Tensor:
        if all(mesh.size(axes) == 1 for axes in dims[path]):
            return leaf
        strides = leaf.new_empty(leaf.shape, device="meta").stride()
        found: Tensor = DTensor.from_local(
            part(leaf, dims[path], mesh), mesh.devices, placements(dims[path], mesh), run_check=False,
            shape=leaf.shape, stride=strides,
        )  # fmt: skip
        return found

    return tree.map_with_path(one, params)


def placements(dims: Dims, mesh: Mesh) -> list[Any]:
    """Return what DTensor says of a leaf, for each axis of the mesh."""
    from torch.distributed.tensor import Replicate, Shard

    found: list[Any] = [Replicate()] * len(mesh.axes)
    for d, axes in enumerate(dims):
        for axis in axes:
            # torch knows a dimension in parts by this name alone, for its own tensor parallelism beside FSDP
            strided = isinstance(axis, Parts) and _strided()(d, split_factor=axis.groups)
            found[mesh.axes.index(axis)] = strided or Shard(d)
    return found


def _strided() -> Any:
    from torch.distributed.tensor import placement_types

    return placement_types._StridedShard


def dims_of(leaf: Any, mesh: Mesh) -> Dims:
    """Return which axes split the dimensions of a leaf; one of one rank splits nothing."""
    if not is_split(leaf):
        return ((),) * leaf.dim()
    dims: list[tuple[str, ...]] = [()] * leaf.dim()
    for axis, placement in zip(mesh.axes, leaf.placements, strict=True):
        if mesh.size(axis) == 1:
            continue
        if isinstance(placement, _strided()):
            dims[placement.dim] += (parts(axis, int(placement.split_factor)),)
        elif placement.is_shard():
            dims[placement.dim] += (axis,)
    return tuple(dims)


class Cut(NamedTuple):
    """How a leaf is cut into pieces of one shape, and which of them this rank has."""

    counts: tuple[int, ...]  # of pieces along each dimension
    pieces: tuple[tuple[tuple[int, ...], tuple[slice, ...]], ...]  # their places, counted in pieces, and where they are
    first: bool  # no rank before this one has the same part


def cut_of(leaf: Any) -> Cut:
    """Return how a DTensor is cut; of a dimension in `parts`, a rank has a piece of each.

    Raises: ValueError for one that is no pieces of one shape: what is to be added over ranks, an order of axes that is
    not the mesh's, or dimensions that do not divide.
    """
    from torch.distributed.tensor import Replicate, Shard

    counts, place, groups, first = [1] * leaf.dim(), [0] * leaf.dim(), [1] * leaf.dim(), True
    coordinate = leaf.device_mesh.get_coordinate()
    for axis, placement in enumerate(leaf.placements):
        size, here = leaf.device_mesh.size(axis), coordinate[axis]
        if type(placement) is Replicate:
            first = first and here == 0
            continue
        strided = isinstance(placement, _strided())
        if not strided and type(placement) is not Shard or strided and counts[placement.dim] > 1:
            raise ValueError(f"expected pieces of one shape, came the placements {leaf.placements}; redistribute it")
        d = placement.dim
        counts[d], place[d] = counts[d] * size, place[d] * size + here
        groups[d] = int(placement.split_factor) if strided else groups[d]
    whole = [n * group for n, group in zip(counts, groups, strict=True)]
    if any(size % count for size, count in zip(leaf.shape, whole, strict=True)):
        raise ValueError(f"expected pieces of one shape, came {tuple(leaf.shape)} in {tuple(whole)}; gather it")
    shape = [size // count for size, count in zip(leaf.shape, whole, strict=True)]
    along = [
        [(g * counts[d] + place[d], slice(g * shape[d], (g + 1) * shape[d])) for g in range(groups[d])]
        for d in range(leaf.dim())
    ]
    found = [tuple(zip(*chosen, strict=True)) if chosen else ((), ()) for chosen in itertools.product(*along)]
    return Cut(tuple(whole), tuple(found), first)


def wrapped(part: Tensor, of: Any) -> Any:
    """Return this rank's part as a DTensor of the placements, shape and strides of another."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, of.device_mesh, of.placements, run_check=False, shape=of.shape, stride=of.stride())


def local(values: tree.Tree) -> tree.Tree:
    """Return a tree of this rank's parts."""
    return tree.map(lambda leaf: leaf.to_local() if is_split(leaf) else leaf, values)


def whole(values: tree.Tree) -> tree.Tree:
    """Return a tree of whole tensors, gathered from all ranks. Every rank must call it."""
    return tree.map(lambda leaf: leaf.full_tensor() if is_split(leaf) else leaf, values)


def wrapped_like(values: tree.Tree, like: tree.Tree) -> tree.Tree:
    """Return local tensors as DTensors of the placements that the leaves of another tree have."""
    return tree.map(lambda x, of: wrapped(x, of) if is_split(of) else x, values, like)


def placed_like(values: tree.Tree, like: tree.Tree) -> tree.Tree:
    """Return the leaves placed as those of another tree: where it has tensors, whole."""

    def one(x: Any, of: Any) -> Any:
        if not is_split(x):
            return x
        if not is_split(of):
            return x.full_tensor()
        return x if x.placements == of.placements else x.redistribute(of.device_mesh, of.placements)

    return tree.map(one, values, like)


def replicating() -> AbstractContextManager[None]:
    """Let plain tensors stand beside DTensors in an operation, as if every rank had them: alike they are."""
    from torch.distributed.tensor.experimental import implicit_replication

    return implicit_replication()
