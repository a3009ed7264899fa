"""Gradients over parts of a batch, one after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from functrain import random, tree


def accumulate(grad_fn: Callable[..., Any], parts: int) -> Callable[..., Any]:
    """Compute `grad_fn(params, batch, key)` on `parts` slices of the batch, one after another, and add.

    Equals `grad_fn` on the whole batch, for any mask and any slice sizes, because a Loss carries sums; the peak
    memory is that of one slice. Part i gets the key `fold_in(key, i)`; one part gets the key itself.

    Shapes: every batch leaf is (B, ...); the slices have B // parts rows, the first B % parts one more.
    Raises: ValueError for parts < 1 or more parts than rows, and naming a leaf whose first dimension is not B.
    """
    if not isinstance(parts, int) or parts < 1:
        raise ValueError(f"accumulate: expected parts >= 1, came {parts!r}")
    if parts == 1:
        return grad_fn

    def accumulated(params: Any, batch: Any, key: Any) -> Any:
        total: Any = None
        for i, rows in enumerate(_cuts(batch, parts)):
            part = tree.map(lambda leaf, rows=rows: leaf[rows], batch)
            loss, grads = grad_fn(params, part, random.fold_in(key, i))
            grads = tree.map(_accumulator, grads)
            total = (loss, grads) if total is None else tree.map(torch.add, total, (loss, grads))
        loss, grads = total
        return loss, tree.map(lambda grad, leaf: grad.to(leaf.dtype), grads, params)

    return accumulated


def _accumulator(grad: torch.Tensor) -> torch.Tensor:
    # float32: adding the small gradient of one part to a bfloat16 sum of many would lose it
    return grad.float() if grad.dtype in (torch.bfloat16, torch.float16) else grad


def _cuts(batch: Any, parts: int) -> list[slice]:
    sizes = {path: _rows(path, leaf) for path, leaf in tree.items(batch)}
    size = next(iter(sizes.values()), 0)
    for path, rows in sizes.items():
        if rows != size:
            raise ValueError(f"accumulate: {path}: expected {size} rows as the first leaf has, came {rows}")
    if parts > size:
        raise ValueError(f"accumulate: expected at most one part a row, came {parts} parts of {size} rows")
    edges = [i * (size // parts) + min(i, size % parts) for i in range(parts + 1)]
    return [slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def _rows(path: str, leaf: Any) -> int:
    if not isinstance(leaf, torch.Tensor) or leaf.dim() == 0:
        came = "a tensor of shape ()" if isinstance(leaf, torch.Tensor) else f"{type(leaf).__name__} {leaf!r}"
        raise ValueError(f"accumulate: {path}: expected a tensor of (B, ...) to cut in parts, came {came}")
    return leaf.shape[0]
