"""Leaves of which each rank has a part: DTensors outside of a loss, local tensors inside."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from functrain import tree
from functrain.sharding.mesh import Mesh
from functrain.sharding.placement import Dims, part


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
            found[mesh.axes.index(axis)] = Shard(d)
    return found


def dims_of(leaf: Any, mesh: Mesh) -> Dims:
    """Return which axes split the dimensions of a leaf."""
    if not is_split(leaf):
        return ((),) * leaf.dim()
    by_axis = dict(zip(mesh.axes, leaf.placements, strict=True))
    return tuple(tuple(axis for axis, placement in by_axis.items() if placement.is_shard(d)) for d in range(leaf.dim()))


def local(values: tree.Tree) -> tree.Tree:
    """Return a tree of this rank's parts."""
    return tree.map(lambda leaf: leaf.to_local() if is_split(leaf) else leaf, values)


def whole(values: tree.Tree) -> tree.Tree:
    """Return a tree of whole tensors, gathered from all ranks. Every rank must call it."""
    return tree.map(lambda leaf: leaf.full_tensor() if is_split(leaf) else leaf, values)


def wrapped_like(values: tree.Tree, like: tree.Tree) -> tree.Tree:
    """Return local tensors as DTensors of the placements that the leaves of another tree have."""
    from torch.distributed.tensor import DTensor

    def one(x: Tensor, of: Any) -> Any:
        if not is_split(of):
            return x
        return DTensor.from_local(x, of.device_mesh, of.placements, run_check=False, shape=of.shape, stride=of.stride())

    return tree.map(one, values, like)


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
