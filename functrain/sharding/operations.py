"""Collectives as operations that a compiled step runs as they are, at their place in its list of calls.

Each takes the name of a mesh, so that the programs of all ranks are the same. `begin_sum` returns while ranks still
add, and `finish` waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from functrain.sharding.mesh import Mesh, named

# of this namespace the compiler knows that its operations run as they are
_library = torch.library.Library("functrain_ranks", "DEF")
_library.define("begin_sum(Tensor[] xs, str mesh, str axes) -> Tensor[]")
_library.define("finish(Tensor[] begun) -> Tensor[]")
_library.define("gather(Tensor x, int dim, str mesh, str axes) -> Tensor[]")
_library.define("scatter(Tensor x, int dim, str mesh, str axes) -> Tensor[]")
_library.define("shift(Tensor x, int by, str mesh, str axes) -> Tensor[]")
_library.define("exchange(Tensor x, int split, int joined, str mesh, str axes) -> Tensor[]")
_library.define("place(Tensor like, str mesh, str axes) -> Tensor[]")

# torch 2.13 has other names for the same
_all_gather: Any = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_reduce_scatter: Any = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor

_works: dict[int, Any] = {}  # what is not finished, by the address of the memory that it writes


def _begin_sum(xs: Sequence[Tensor], mesh: str, axes: str) -> list[Tensor]:
    """Return the elements of all, one after another, to be added over ranks."""
    flat = _flat(xs)
    work = distributed.all_reduce(flat, group=_group(mesh, axes), async_op=True)
    _works[flat.untyped_storage().data_ptr()] = work
    return [flat]


def _finish(begun: Sequence[Tensor]) -> list[Tensor]:
    for x in begun:
        _works.pop(x.untyped_storage().data_ptr()).wait()
    return list(begun)


def _flat(xs: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in xs])  # new memory, of one tensor too


def _gather(x: Tensor, dim: int, mesh: str, axes: str) -> list[Tensor]:
    part = x.movedim(dim, 0).contiguous()
    whole = part.new_empty((part.shape[0] * named(mesh).size(axes.split(",")), *part.shape[1:]))
    _all_gather(whole, part, group=_group(mesh, axes))
    return [whole.movedim(0, dim)]


def _scatter(x: Tensor, dim: int, mesh: str, axes: str) -> list[Tensor]:
    whole = x.movedim(dim, 0).contiguous()
    part = whole.new_empty((whole.shape[0] // named(mesh).size(axes.split(",")), *whole.shape[1:]))
    _reduce_scatter(part, whole, group=_group(mesh, axes))
    return [part.movedim(0, dim)]


def _shift(x: Tensor, by: int, mesh: str, axes: str) -> list[Tensor]:
    group, grid = _group(mesh, axes), named(mesh)
    size, place = grid.size(axes), grid.index(axes)
    ranks = distributed.get_process_group_ranks(group)
    given, found = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    both = [
        distributed.P2POp(distributed.isend, given, ranks[(place + by) % size], group),
        distributed.P2POp(distributed.irecv, found, ranks[(place - by) % size], group),
    ]
    for work in distributed.batch_isend_irecv(both):
        work.wait()
    return [found]


def _exchange(x: Tensor, split: int, joined: int, mesh: str, axes: str) -> list[Tensor]:
    parts = torch.stack(x.chunk(named(mesh).size(axes), split)).contiguous()
    found = torch.empty_like(parts)
    distributed.all_to_all_single(found, parts, group=_group(mesh, axes))
    return [torch.cat(found.unbind(), joined)]


def _place(like: Tensor, mesh: str, axes: str) -> list[Tensor]:
    return [torch.tensor(named(mesh).index(axes.split(",")), device=like.device)]


def _group(mesh: str, axes: str) -> Any:
    return named(mesh).group(axes.split(","))


def _scaled(x: Tensor, dim: int, numerator: int, denominator: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = shape[dim] * numerator // denominator
    moved = [shape[dim], *shape[:dim], *shape[dim + 1 :]]
    return x.new_empty(moved).movedim(0, dim)  # laid out as the collective does it


def _size(mesh: str, axes: str) -> int:
    return named(mesh).size(axes.split(","))


_RUN = {
    "begin_sum": _begin_sum, "finish": _finish, "gather": _gather, "scatter": _scatter, "shift": _shift,
    "exchange": _exchange, "place": _place,
}  # fmt: skip
_FAKE: dict[str, Callable[..., Any]] = {
    "begin_sum": lambda xs, mesh, axes: [xs[0].new_empty(sum(x.numel() for x in xs))],
    "finish": lambda begun: [torch.empty_like(x) for x in begun],
    "gather": lambda x, dim, mesh, axes: [_scaled(x, dim, _size(mesh, axes), 1)],
    "scatter": lambda x, dim, mesh, axes: [_scaled(x, dim, 1, _size(mesh, axes))],
    "shift": lambda x, by, mesh, axes: [torch.empty_like(x, memory_format=torch.contiguous_format)],
    "exchange": lambda x, split, joined, mesh, axes: [
        torch.cat([torch.empty_like(part) for part in x.chunk(named(mesh).size(axes), split)], joined)
    ],
    "place": lambda like, mesh, axes: [torch.empty((), dtype=torch.int64, device=like.device)],
}
for _name, _run in _RUN.items():
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _run, _key)
    torch.library.register_fake(f"functrain_ranks::{_name}", _FAKE[_name], lib=_library)


def sums(xs: Sequence[Tensor], mesh: Mesh, axes: tuple[str, ...]) -> list[Tensor]:
    """Add tensors over ranks, those of one dtype together; ranks go on adding while other operations run."""
    found: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(x.dtype for x in xs):
        places = [i for i, x in enumerate(xs) if x.dtype == dtype]
        if not any(xs[i].numel() for i in places):  # no memory, by whose address a sum is known
            found |= {i: xs[i] for i in places}
            continue
        begun = torch.ops.functrain_ranks.begin_sum([xs[i] for i in places], mesh.name, ",".join(axes))
        (flat,) = torch.ops.functrain_ranks.finish(begun)
        parts = flat.split([xs[i].numel() for i in places])
        found |= {i: part.view(xs[i].shape) for i, part in zip(places, parts, strict=True)}
    return [found[i] for i in range(len(xs))]
