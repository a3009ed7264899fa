"""Layers whose leaves are split over ranks: gathered where they run, let go of, and gathered again for the backward
pass (ZeRO-3; torch's `fully_shard` calls it reshard after forward)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from functrain import tree
from functrain.compiler import engine
from functrain.sharding import mesh
from functrain.sharding.using import is_gathered_again, is_held, use
from functrain.transforms.recompute import outside_of_torch_func


def gathered(block: Callable[..., Any]) -> Callable[..., Any]:
    """Return the block of a stack for layers that are held by their parts."""
    latest: list[_Layer] = []  # of one backward pass, the layer that is whole in it

    def run(layer: Any, x: Any, *args: Any) -> Any:
        if not is_held(layer):
            return block(layer, x, *args)
        if not is_gathered_again(layer) or not torch.is_grad_enabled() or engine.here.plain:
            return block(use(layer), x, *args)
        if engine.partitions():
            with engine.here.cutter.recomputing((), ()):
                whole = use(layer)
            return block(whole, x, *args)
        # within a recomputed layer nothing of it is kept, and a caller's own hooks keep what they keep
        around = torch._C._autograd._top_saved_tensors_default_hooks(False)
        if not outside_of_torch_func() or around is not None:
            return block(use(layer), x, *args)
        again = _Layer(layer, latest)
        whole = again.first()
        with saved_tensors_hooks(again.place, again.tensor):
            return block(whole, x, *args)

    return run


class _Layer:
    """What autograd saves of a layer: where in its gathered leaves a tensor lies, in place of the tensor."""

    def __init__(self, layer: Any, latest: list[_Layer]) -> None:
        self.layer, self.latest = layer, latest
        self.mesh, self.axis = mesh.current(), mesh.tensor_axis()
        self.storages: dict[int, tuple[int, int]] = {}  # which leaf lies there, and its version
        self.placed = self.asked = 0
        self.whole: list[Tensor] = []

    def first(self) -> Any:
        """Gather the leaves, and remember where they lie."""
        found = use(self.layer)
        leaves = enumerate(_gathered(self.layer, found))
        self.storages = {x.untyped_storage()._cdata: (i, x._version) for i, x in leaves}
        return found

    def place(self, x: Tensor) -> Any:
        i, version = self.storages.get(x.untyped_storage()._cdata, (None, 0))
        if i is None or x._version != version:  # what a block has written into, no gather would bring
            return x, x._version
        self.placed += 1
        return i, x.shape, x.stride(), x.storage_offset(), x.dtype

    def tensor(self, saved: Any) -> Tensor:
        if isinstance(saved[0], Tensor):
            x, version = saved
            if x._version != version:  # which autograd checks for what no hook has seen
                raise RuntimeError(
                    "nn.stack: one of the variables needed for gradient computation has been modified by an inplace "
                    f"operation: {x.dtype} {tuple(x.shape)} is at version {x._version}, expected {version}"
                )
            return x
        i, shape, strides, offset, dtype = saved
        if not self.whole:
            self._gather()
        whole = self.whole[i] if dtype == self.whole[i].dtype else self.whole[i].view(dtype)
        found = whole.as_strided(shape, strides, offset)
        self.asked += 1
        if self.asked == self.placed:  # until another backward pass through the same graph
            self.let_go()
        return found

    def let_go(self) -> None:
        self.whole, self.asked = [], 0

    def _gather(self) -> None:
        for other in self.latest:  # one that the backward pass did not ask for everything of
            other.let_go()
        self.latest[:] = [self]
        with torch.no_grad(), mesh.entered(self.mesh, self.axis):
            self.whole = _gathered(self.layer, use(self.layer))


def _gathered(layer: Any, whole: Any) -> list[Tensor]:
    """Return the tensors that a gathered layer has in the place of its held leaves, and that lie elsewhere."""
    own = {leaf.untyped_storage()._cdata for leaf in tree.leaves(layer) if isinstance(leaf, Tensor)}
    leaves = [leaf for leaf in tree.leaves(whole) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.untyped_storage()._cdata not in own]
