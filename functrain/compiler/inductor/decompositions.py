"""What an operation is made of, before torch's compiler sees it: its own table, and sums over rows that several indices
name, which it adds from several threads in the order in which these come, so that no two runs are the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table

aten = torch.ops.aten


@cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return what takes each operation apart, or returns NotImplemented to leave it whole."""
    table = dict(select_decomp_table())
    ours: dict[Any, Callable[..., Any]] = {
        aten.embedding_dense_backward.default: _whole,
        aten.index_put.default: _index_put,
        aten.index_add.default: _index_add,
    }

    def apart(operation: Any) -> Callable[..., Any]:
        on_cpu, elsewhere = ours[operation], table.get(operation, _whole)

        def taken(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            sums = x.device.type == "cpu" and x.is_floating_point()
            found = on_cpu(x, *args, **kwargs) if sums else None
            return elsewhere(x, *args, **kwargs) if found is None else found

        return taken

    return table | {operation: apart(operation) for operation in ours}


def _whole(*args: Any, **kwargs: Any) -> Any:
    return NotImplemented


def _index_put(x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor | None:
    """Add values to rows by `scatter_add`, which adds to each in the order of the indices."""
    dims = [dim for dim, index in enumerate(indices) if index is not None]
    given = [index for index in indices if index is not None]
    alike = x.dtype == values.dtype and all(index.dtype == torch.int64 for index in given)
    if not accumulate or not alike or dims != list(range(dims[0], dims[-1] + 1)):
        return None
    first, sizes = dims[0], [x.shape[dim] for dim in dims]
    given = list(torch.broadcast_tensors(*given))
    row, outside = torch.zeros_like(given[0]), torch.zeros_like(given[0], dtype=torch.bool)
    for index, size in zip(given, sizes, strict=True):
        row = row * size + torch.where(index < 0, index + size, index)
        outside = outside | (index < -size) | (index >= size)
    row = torch.where(outside, math.prod(sizes), row)  # an error, and not another row
    before, after = x.shape[:first], x.shape[first + len(dims) :]
    values = values.expand(*before, *row.shape, *after).reshape(*before, row.numel(), *after).movedim(first, 0)
    flat = x.reshape(*before, -1, *after).movedim(first, 0)
    return _add_rows(flat, row.reshape(-1), values).movedim(0, first).reshape(x.shape)


def _index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: Any = 1) -> Tensor | None:
    if x.dim() == 0 or x.dtype != source.dtype:
        return None
    values = source if alpha == 1 else source * alpha
    return _add_rows(x.movedim(dim, 0), index.reshape(-1).long(), values.movedim(dim, 0)).movedim(0, dim)


def _add_rows(x: Tensor, row: Tensor, values: Tensor) -> Tensor:
    where = row.view(-1, *[1] * (values.dim() - 1)).expand(values.shape)
    return torch.scatter_add(x, 0, where, values)
