"""How a step is spread over ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from functrain import tree
from functrain.sharding import collectives, operations
from functrain.sharding.mesh import Axes, Mesh, entered

_BUCKET = 2**24  # bytes that are added at once: a smaller sum waits, a larger one begins late


class Plan:
    """A mesh of ranks, and what is split over its axes.

    Along the axes of `batch`, by default all, each rank has other rows of a batch, and the same params: data parallel.
    Its step is that of the whole batch: losses, weights, metrics and gradients are added over ranks. Gradients are
    added in their own dtype, or in `reduce_dtype`. `device` is this rank's, by default cuda where there is one.

    Give it to `ft.train_step(..., plan=)` and `ft.data.shard(batches, plan=)`, on every rank, under torchrun.

    Raises: ValueError for a mesh that does not have as many places as there are ranks, and axes that are not in it.

    >>> plan = ft.sharding.Plan({"data": 1})  # {"data": 8} under torchrun --nproc-per-node 8
    >>> plan.ranks, plan.rank
    (1, 0)
    """

    def __init__(
        self,
        mesh: Mapping[str, int],
        *,
        batch: Axes | None = None,
        reduce_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.mesh: Mesh = Mesh(mesh, device)
        self.batch: tuple[str, ...] = self.mesh.axes if batch is None else self.mesh.ordered(batch)
        if reduce_dtype is not None and not reduce_dtype.is_floating_point:
            raise ValueError(f"Plan: expected a floating-point reduce_dtype, came {reduce_dtype}")
        self.reduce_dtype: torch.dtype | None = reduce_dtype
        self.mesh.group(self.batch)

    @property
    def ranks(self) -> int:
        """How many ranks have rows of their own."""
        return self.mesh.size(self.batch)

    @property
    def rank(self) -> int:
        """Which rows of a batch this rank has."""
        return self.mesh.index(self.batch)

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self.mesh.device

    def entered(self) -> Any:
        """Let `ft.sharding.sum` and the others, called inside, know the mesh."""
        return entered(self.mesh)

    def place(self, like: Tensor) -> Tensor:
        """Return `rank` as a () tensor, which no program contains."""
        with self.entered():
            return collectives.index(self.batch, like)

    def sum(self, values: tree.Tree) -> tree.Tree:
        """Add the tensors of a tree over the ranks that have other rows; the sums are alike on all ranks."""
        if self.ranks == 1:
            return values
        leaves, structure = tree.flatten(values)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        summed = dict(zip(places, self._sums([leaves[i] for i in places]), strict=True))
        return tree.unflatten(structure, [summed.get(i, leaf) for i, leaf in enumerate(leaves)])

    def mean(self, values: tree.Tree) -> tree.Tree:
        """Return the means of floating-point tensors over the ranks that have other rows, and other tensors as they
        are."""
        if self.ranks == 1:
            return values
        leaves, structure = tree.flatten(values)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if places:
            for i, summed in zip(places, self._sums([leaves[i] for i in places]), strict=True):
                leaves[i] = summed / self.ranks
        return tree.unflatten(structure, leaves)

    def sum_gradients(self, grads: tree.Tree) -> tree.Tree:
        """Do as `sum`, in `reduce_dtype`, a part of the leaves at a time."""
        if self.ranks == 1:
            return grads
        leaves, structure = tree.flatten(grads)
        summed: list[Tensor] = []
        for some in buckets(leaves):
            wide = some if self.reduce_dtype is None else [x.to(self.reduce_dtype) for x in some]
            summed += [s.to(x.dtype) for s, x in zip(self._sums(wide), some, strict=True)]
        return tree.unflatten(structure, summed)

    def _sums(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        return operations.sums(leaves, self.mesh, self.batch)


def buckets(leaves: Sequence[Tensor], bytes: int = _BUCKET) -> list[list[Tensor]]:
    """Cut a list of tensors into lists of about so many bytes; a larger tensor is one by itself."""
    found: list[list[Tensor]] = []
    size = bytes
    for leaf in leaves:
        if size + leaf.nbytes > bytes:
            found.append([])
            size = 0
        found[-1].append(leaf)
        size += leaf.nbytes
    return found
