"""How a step is spread over ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from functrain import tree
from functrain.sharding import collectives, operations, pieces
from functrain.sharding.mesh import Mesh, check_alike, entered
from functrain.sharding.placement import Dims, P, Rule, resolved, split_axes
from functrain.sharding.split import streaming
from functrain.sharding.using import bind
from functrain.tree.selection import Pattern

_BUCKET = 2**24  # bytes that are added at once: a smaller sum waits, a larger one begins late


@dataclass(frozen=True)
class Spread:
    """How the leaves of params are split, by path."""

    dims: tuple[tuple[str, Dims], ...]


class Plan:
    """A mesh of ranks, and what is split over its axes.

    Each rank has other rows of a batch. The step is that of the whole batch: losses, weights, metrics and gradients are
    added over ranks, gradients in their own dtype or in `reduce_dtype`: float32 beside `ft.mixed_precision`, which
    casts split params before they are gathered. `device` is this rank's, by default cuda where there is one.

    `params` are rules `(pattern of paths, P(...))` that say which axes split which dimensions, as
    `ft.tree.select` takes patterns; by default every rank has all params: data parallel. Of what is split each rank
    keeps its part, of gradients and the optimizer's moments too, and gathers it when it is used: FSDP, ZeRO-3. Leaves
    that fit `layers`, by default those of `blocks`, are gathered layer by layer, by `ft.nn.stack`, let go of, and
    gathered again for the backward pass; without `reshard_after_forward` they are kept for it: less is sent, and more
    memory taken. The others are gathered when the loss begins, and kept.

    Along the axis `tensor`, ranks have the same rows, and layers compute with the parts of leaves that it splits
    (tensor parallelism, TP, of Megatron): `ft.nn.linear` with columns or rows, `ft.nn.embedding` and
    `ft.losses.next_token_from_hidden` with rows of a vocabulary, attention with some of the heads.
    `ft.models.gpt2.sharding` and its like are rules for it. With `stream`, between these layers each rank has some of
    the tokens (sequence parallelism), which `ft.nn.stack` splits and gathers.

    Give it to `ft.train_step(..., plan=)` and `ft.data.shard(batches, plan=)`, on every rank, under torchrun; begin
    with `ft.init_state(plan.shard(params), ...)`.

    Raises: ValueError for a mesh that does not have as many places as there are ranks, and axes that are not in it.

    >>> plan = ft.sharding.Plan({"data": 1})  # {"data": 8} under torchrun --nproc-per-node 8
    >>> plan.ranks, plan.rank
    (1, 0)
    """

    def __init__(
        self,
        mesh: Mapping[str, int],
        params: Sequence[Rule] = (("**", P()),),
        *,
        layers: str | Sequence[str] = "blocks/*/**",
        tensor: str | None = None,
        stream: bool = False,
        reshard_after_forward: bool = True,
        reduce_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.mesh: Mesh = Mesh(mesh, device)
        self.rules: tuple[Rule, ...] = tuple(params)
        self.layers: tuple[str, ...] = (layers,) if isinstance(layers, str) else tuple(layers)
        if tensor is not None:
            self.mesh.ordered(tensor)
        if stream and tensor is None:
            raise ValueError("Plan: expected an axis tensor= beside stream, whose ranks split the tokens, came none")
        self.tensor: str | None = tensor
        self.stream: bool = stream
        self._late = [Pattern(text) for text in self.layers]
        if reduce_dtype is not None and not reduce_dtype.is_floating_point:
            raise ValueError(f"Plan: expected a floating-point reduce_dtype, came {reduce_dtype}")
        self.reduce_dtype: torch.dtype | None = reduce_dtype
        self.reshard_after_forward: bool = reshard_after_forward
        self._checked: set[Any] = set()
        if self.mesh.world > 1:
            asked = {"params": self.rules, "layers": self.layers, "tensor": tensor, "stream": stream}
            facts = {**asked, "reduce_dtype": reduce_dtype, "reshard_after_forward": reshard_after_forward}
            check_alike({f"plan's {name}": repr(value) for name, value in facts.items()})

    @property
    def batch(self) -> tuple[str, ...]:
        """The axes along which ranks have rows of their own."""
        return tuple(axis for axis in self.mesh.axes if axis != self.tensor)

    @property
    def duplicates(self) -> int:
        """How many ranks have the same rows, and the same loss."""
        return 1 if self.tensor is None else self.mesh.size(self.tensor)

    @property
    def ranks(self) -> int:
        """How many ranks have rows of their own."""
        return self.mesh.size(self.batch) if self.batch else 1

    @property
    def rank(self) -> int:
        """Which rows of a batch this rank has."""
        return self.mesh.index(self.batch) if self.batch else 0

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self.mesh.device

    def entered(self) -> Any:
        """Let `ft.sharding.sum` and the others, called inside, know the mesh."""
        return _within(self)

    def place(self, like: Tensor) -> Tensor:
        """Return `rank` as a () tensor, which no program contains."""
        with self.entered():
            return collectives.index(self.batch, like)

    def shard(self, params: tree.Tree) -> tree.Tree:
        """Return the params as DTensors, of which this rank keeps its part, as the rules say.

        Every rank gives the same params. Raises: ValueError as `resolved` says, naming a path.
        """
        return pieces.shard(params, resolved(params, self.rules, self.mesh), self.mesh)

    def whole(self, values: tree.Tree) -> tree.Tree:
        """Return a tree, such as params or a state, with all leaves whole. Every rank must call it."""
        return pieces.whole(values)

    def spread(self, params: tree.Tree) -> Spread | None:
        """Return how the leaves of params are split, None where none is.

        Raises: ValueError naming a leaf that is not split as the rules say.
        """
        dims = {path: pieces.dims_of(leaf, self.mesh) for path, leaf in tree.items(params)}
        self._check(params, dims)
        return Spread(tuple(dims.items())) if any(any(each) for each in dims.values()) else None

    def _check(self, params: tree.Tree, dims: Mapping[str, Dims]) -> None:
        key = tree.structure(params), tuple(dims.values())
        if self.mesh.world == 1 or key in self._checked:
            return
        for path, wanted in resolved(params, self.rules, self.mesh).items():
            some = tuple(tuple(axis for axis in axes if self.mesh.size(axis) > 1) for axes in wanted)
            if some != dims[path]:
                raise ValueError(
                    f"Plan: {path}: expected a leaf that is split by {P(*(axes or None for axes in some))!r}, as the "
                    f"rules say, came one by {P(*(axes or None for axes in dims[path]))!r}; begin with "
                    "ft.init_state(plan.shard(params), ...)"
                )
        self._checked.add(key)

    def bind(self, params: tree.Tree, spread: Spread | None) -> tree.Tree:
        """Return what a loss is called with, of this rank's parts of the params."""
        if spread is None:
            return params
        late = {path: any(pattern.fits(path) for pattern in self._late) for path, _ in spread.dims}
        kept = () if self.tensor is None else (self.tensor,)
        return bind(params, dict(spread.dims), late, kept, self.reduce_dtype, self.reshard_after_forward)

    def sum(self, values: tree.Tree) -> tree.Tree:
        """Add the tensors of a tree over the ranks that have other rows; the sums are alike on all ranks.

        Raises: NotImplementedError where they are differentiated, for which there is `ft.sharding.sum`.
        """
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

    def sum_gradients(self, grads: tree.Tree, spread: Spread | None) -> tree.Tree:
        """Add the gradients of this rank's parts over the axes that do not split them, in `reduce_dtype`, a part of the
        leaves at a time; gathering has added over the others."""
        if self.mesh.world == 1:
            return grads
        leaves, structure = tree.flatten(grads)
        todo: dict[tuple[str, ...], list[int]] = {}
        dims = {} if spread is None else dict(spread.dims)
        for i, path in enumerate(tree.paths(grads)):
            split = split_axes(dims.get(path, ()))
            todo.setdefault(tuple(axis for axis in self.mesh.axes if axis not in split), []).append(i)
        for axes, places in todo.items():
            if not axes or self.mesh.size(axes) == 1:
                continue
            done: list[Tensor] = []
            _check_not_differentiated([leaves[i] for i in places])
            for some in buckets([leaves[i] for i in places]):
                wide = some if self.reduce_dtype is None else [x.to(self.reduce_dtype) for x in some]
                sums = operations.sums(wide, self.mesh, axes)
                done += [s.to(x.dtype) for s, x in zip(sums, some, strict=True)]
            for i, summed in zip(places, done, strict=True):
                leaves[i] = summed
        return tree.unflatten(structure, leaves)

    def _sums(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        _check_not_differentiated(leaves)
        return operations.sums(leaves, self.mesh, self.batch)


def _check_not_differentiated(leaves: Sequence[Tensor]) -> None:
    if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves):
        raise NotImplementedError(
            "Plan: expected tensors that nobody differentiates to add over ranks, came some that are; in a loss call "
            "ft.sharding.sum(x, axes); for a gradient through steps, as of ft.train.unroll, take steps without a plan"
        )


@contextmanager
def _within(plan: Plan) -> Iterator[None]:
    streamed = plan.stream and plan.duplicates > 1  # one rank has all tokens
    with entered(plan.mesh, plan.tensor), streaming(plan.tensor if streamed else None):
        yield


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
