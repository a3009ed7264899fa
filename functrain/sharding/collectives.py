"""Functions of one tensor on each rank: sums over ranks, gathering, scattering, shifts, exchanges.

The tensors of all ranks are the arguments of one function, and what is differentiated is the sum of all ranks' losses.
So the derivative of a collective is its transpose: of a sum a sum, of gathering scattering, of a shift the shift back.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.sharding import operations
from functrain.sharding.mesh import Axes, current, named


def sum(x: Tensor, axes: Axes) -> Tensor:
    """Add x over the ranks along the axes; every one gets the sum. As `jax.lax.psum`.

    Shapes: (...) -> (...).
    Raises: ValueError for an axis that the mesh does not have; RuntimeError outside of a step with a plan.
    """
    return applied("sum", x, axes)


def gather(x: Tensor, axes: Axes, dim: int = 0) -> Tensor:
    """Put the parts of all n ranks along the axes one after another; every rank gets the whole. As
    `jax.lax.all_gather(tiled=True)`.

    Shapes: (..., D, ...) -> (..., n * D, ...), D alike on all ranks.
    Raises: as `sum`; IndexError for a dimension that x does not have.
    """
    return applied("gather", x, axes, _dimension(x, dim))


def scatter(x: Tensor, axes: Axes, dim: int = 0) -> Tensor:
    """Add x over the n ranks along the axes, and give each rank its part of the sum. As
    `jax.lax.psum_scatter(tiled=True)`.

    Shapes: (..., n * D, ...) -> (..., D, ...).
    Raises: as `gather`; ValueError for a dimension that does not divide by n.
    """
    _check_divides("scatter", x, axes, _dimension(x, dim))
    return applied("scatter", x, axes, _dimension(x, dim))


def shift(x: Tensor, axis: str, by: int = 1) -> Tensor:
    """Give x to the rank that comes `by` places later along the axis, after the last the first. As `jax.lax.ppermute`
    of a ring.

    Shapes: (...) -> (...), alike on all ranks.
    Raises: as `sum`.
    """
    return applied("shift", x, (axis,), by)


def exchange(x: Tensor, axis: str, split: int = 0, joined: int = 0) -> Tensor:
    """Give the i-th of n parts of x along `split` to rank i of the axis, and put what comes from all one after another
    along `joined`. As `jax.lax.all_to_all(tiled=True)`.

    Shapes: (..., n * D, ..., E, ...) -> (..., D, ..., n * E, ...).
    Raises: as `scatter`.
    """
    _check_divides("exchange", x, (axis,), _dimension(x, split))
    return applied("exchange", x, (axis,), _dimension(x, split), _dimension(x, joined))


def index(axes: Axes, like: Tensor) -> Tensor:
    """Return the place of this rank along the axes, a () int64 tensor beside `like`. As `jax.lax.axis_index`.

    Raises: as `sum`.
    """
    mesh = current()
    chosen = mesh.ordered(axes)
    if mesh.size(chosen) == 1:
        return torch.zeros((), dtype=torch.int64, device=like.device)
    found: Tensor = torch.ops.functrain_ranks.place(like.detach(), mesh.name, ",".join(chosen))[0]
    return found


class _Collective(NamedTuple):
    """A linear function of one tensor."""

    name: str
    mesh: str
    axes: str
    numbers: tuple[int, ...] = ()  # dimensions; of a shift, how far
    added_in: torch.dtype | None = None  # what a scatter adds in

    def __call__(self, x: Tensor) -> Tensor:
        mesh, axes = named(self.mesh), tuple(self.axes.split(","))
        if self.name in ("sum", "total", "average"):
            summed = operations.sums([x], mesh, axes)[0]
            return summed / mesh.size(axes) if self.name == "average" else summed
        if self.name in ("spread", "agreed"):
            return x.clone()
        if self.name == "portion":
            return x / mesh.size(axes)
        if self.name == "own":
            (dim,) = self.numbers
            place = torch.ops.functrain_ranks.place(x, self.mesh, self.axes)[0]
            return x.unflatten(dim, (mesh.size(axes), -1)).index_select(dim, place[None]).squeeze(dim)
        if self.name == "join":
            return self._replace(name="gather")(x)
        dtype = self.added_in if self.name == "scatter" and self.added_in is not None else x.dtype
        found: Tensor = getattr(torch.ops.functrain_ranks, self.name)(x.to(dtype), *self.numbers, self.mesh, self.axes)[
            0
        ]
        return found.to(x.dtype)

    def transposed(self) -> _Collective:
        if self.name in _TRANSPOSED:
            return self._replace(name=_TRANSPOSED[self.name])
        if self.name == "shift":
            return self._replace(numbers=(-self.numbers[0],))
        return self._replace(numbers=self.numbers[::-1])

    def mapped(self) -> _Collective:
        """Return what does the same for each x[i]."""
        return self if self.name == "shift" else self._replace(numbers=tuple(n + 1 for n in self.numbers))


_TRANSPOSED = {
    "gather": "scatter", "scatter": "gather",
    # from what all ranks have alike to what each has, and back: of `shard_map`
    "own": "join", "join": "own", "spread": "total", "total": "spread",
    "agreed": "portion", "portion": "average", "average": "portion",
}  # fmt: skip


class _Applied(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, collective: _Collective) -> Tensor:
        return collective(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.collective = inputs[1]

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return _Applied.apply(cotangents[0], ctx.collective.transposed()), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Applied.apply(tangents[0], ctx.collective)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, collective: _Collective) -> tuple[Tensor, int]:
        return _Applied.apply(x.movedim(in_dims[0], 0), collective.mapped()), 0


def gather_for_use(x: Tensor, axes: Axes, added_in: torch.dtype | None) -> Tensor:
    """Gather along the first dimension; the gradient is added over ranks in that dtype, None for its own."""
    return applied("gather", x, axes, 0, added_in=added_in)


def applied(name: str, x: Tensor, axes: Axes, *numbers: int, added_in: torch.dtype | None = None) -> Tensor:
    mesh = current()
    chosen = mesh.ordered(axes)
    if mesh.size(chosen) == 1:
        return x
    found: Tensor = _Applied.apply(x, _Collective(name, mesh.name, ",".join(chosen), numbers, added_in))
    return found


def _dimension(x: Tensor, dim: int) -> int:
    if not -x.dim() <= dim < x.dim():
        raise IndexError(f"sharding: expected a dimension of a tensor of shape {tuple(x.shape)}, came {dim}")
    return dim % x.dim()


def _check_divides(what: str, x: Tensor, axes: Axes, dim: int) -> None:
    count = current().size(axes)
    if x.shape[dim] % count:
        raise ValueError(
            f"sharding: {what}: expected a dimension that divides into {count} ranks, came {x.shape[dim]} of "
            f"{tuple(x.shape)}; pad it, or choose another"
        )
