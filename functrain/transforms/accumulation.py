"""Gradients over parts of a batch, one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, overload

import torch

from functrain import random, tree
from functrain.compiler import engine
from functrain.transforms.gradient import add_leaves, vmap
from functrain.transforms.loss_scale import wide
from functrain.tree.rows import edges

Params = TypeVar("Params")
Buffers = TypeVar("Buffers")
Batch = TypeVar("Batch")
Key = TypeVar("Key")
Result = TypeVar("Result", bound=tuple[Any, Any])


@overload
def accumulate(
    grad_fn: Callable[[Params, Batch, Key], Result],
    parts: int | None = None,
    *,
    rows: int | None = None,
    buffers: Literal[False] = False,
) -> Callable[[Params, Batch, Key], Result]: ...
@overload
def accumulate(
    grad_fn: Callable[[Params, Buffers, Batch, Key], Result],
    parts: int | None = None,
    *,
    rows: int | None = None,
    buffers: Literal[True],
) -> Callable[[Params, Buffers, Batch, Key], Result]: ...
def accumulate(
    grad_fn: Callable[..., Any], parts: int | None = None, *, rows: int | None = None, buffers: bool = False
) -> Callable[..., Any]:
    """Compute `grad_fn(params, batch, key)` on `parts` slices of the batch, one after another, and add.

    Equals `grad_fn` on the whole batch, for any mask and any slice sizes, because a Loss carries sums; the peak
    memory is that of one slice and the sum of the gradients. Half-precision gradients are added in float32, as are
    half-precision losses, which stay so. Part i gets the key `fold_in(key, i)`; one part gets the key itself.

    With `rows` in place of `parts` every slice has that many rows, the last one what is left: the number of parts
    follows the batch, which may grow during a run without a new compilation.

    With `buffers`, `grad_fn(params, buffers, batch, key)` returns `((loss, new_buffers), grads)`, as the
    `value_and_grad(loss_fn, has_aux=True)` of a loss with buffers does; part i + 1 gets the buffers of part i, as in a
    loop over a torch.nn.Module.

    Shapes: every batch leaf is (B, ...); the slices have B // parts rows, the first B % parts one more.
    Raises: ValueError for parts or rows < 1, for both or neither, for more parts than rows, and naming a leaf whose
    first dimension is not B.

    >>> def loss_fn(params, batch, key):
    ...     losses = (params["w"] - batch["x"]) ** 2
    ...     return ft.Loss(losses.sum(), losses.new_tensor(len(losses)), {})
    >>> params, batch = {"w": torch.tensor(1.0)}, {"x": torch.arange(4.0)}
    >>> loss, grads = ft.accumulate(ft.value_and_grad(loss_fn), parts=2)(params, batch, None)
    >>> loss.total, loss.weight, grads
    (tensor(6.), tensor(4.), {'w': tensor(-4.)})
    """
    check_parts("accumulate", parts, rows)
    if parts == 1:
        return grad_fn

    def add(total: list[torch.Tensor], params: Any, *args: Any) -> Any:
        result = grad_fn(params, *args)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(
                f"accumulate: expected grad_fn to return (loss, gradients), came {type(result).__name__}; pass "
                "value_and_grad(loss_fn) in place of grad(loss_fn)"
            )
        found, grads = result
        tree.check_same_structure(params, grads, what="accumulate: params and the gradients of grad_fn")
        leaves = tree.leaves(grads)
        del result, grads
        add_leaves(total, leaves)
        return found

    added = sums(add, parts, rows=rows, buffers=buffers)

    def accumulated(params: Any, *args: Any) -> Any:
        result, grads = added(params, *args)
        return result, tree.map(lambda grad, leaf: grad.to(leaf.dtype), grads, params)

    return accumulated


def sums(
    add: Callable[..., Any],
    parts: int | None,
    *,
    rows: int | None,
    buffers: bool,
    first: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Callable[..., Any]:
    """Make `accumulate(...)` with gradients left in the dtype that they are added in.

    `add(total, params, ...)` adds the gradients of a part to the list `total`, as that of `add_gradients` does. Of a
    batch whose parts other ranks have, too, `first(key)` is the number of the first part here.
    """

    def accumulated(params: Any, *args: Any) -> Any:
        if len(args) != 2 + buffers:
            wanted = "(params, buffers, batch, key)" if buffers else "(params, batch, key)"
            raise TypeError(
                f"accumulate: expected {wanted}, came {1 + len(args)} arguments; a loss that draws nothing takes a key "
                "of None"
            )
        *before, batch, key = args
        cuts = _cuts(batch, parts, rows)

        keys = _keys(key, len(cuts), first)

        result: Any = None
        total: list[torch.Tensor] = []
        for i, cut in enumerate(cuts):
            part = tree.map(lambda leaf, cut=cut: leaf[cut], batch)
            with engine.repeating():  # with one part too: the next batch may be larger
                found = add(total, params, *before, part, keys[i])
            if buffers:
                found, new = found
                before = [new]
            if len(cuts) > 1:  # a bfloat16 weight of a few rows stops growing at some hundreds
                found = tree.map(lambda leaf: wide(leaf) if isinstance(leaf, torch.Tensor) else leaf, found)
            result = found if result is None else tree.map(torch.add, result, found)
        return ((result, before[0]) if buffers else result), tree.unflatten(tree.structure(params), total)

    return accumulated


def _keys(key: Any, count: int, first: Callable[[torch.Tensor], torch.Tensor] | None) -> Sequence[Any]:
    """Return the key of each part."""
    if key is None or (count == 1 and first is None):
        return [key] * count
    begin: Any = 0 if first is None else first(key)
    if engine.here.tracing:  # all at once: a graph that does not grow with the parts
        return vmap(lambda i: random.fold_in(key, i))(begin + torch.arange(count, device=key.device)).unbind()
    return [random.fold_in(key, begin + i) for i in range(count)]


def check_parts(what: str, parts: Any, rows: Any) -> None:
    """Raise unless one of the two says how to cut a batch."""
    if (parts is None) == (rows is None):
        raise ValueError(f"{what}: expected either a number of parts or rows, came parts={parts!r} and rows={rows!r}")
    name, value = ("parts", parts) if rows is None else ("rows", rows)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{what}: expected {name} >= 1, came {value!r}")


def _cuts(batch: Any, parts: int | None, rows: int | None) -> list[slice]:
    sizes = {path: _rows(path, leaf) for path, leaf in tree.items(batch)}
    size = next(iter(sizes.values()), 0)
    for path, found in sizes.items():
        if found != size:
            raise ValueError(f"accumulate: {path}: expected {size} rows as the first leaf has, came {found}")
    if rows is not None:
        if size == 0:
            raise ValueError("accumulate: expected a batch with rows, came one without")
        cuts = [*range(0, size, rows), size]
    else:
        assert parts is not None
        if parts > size:
            raise ValueError(f"accumulate: expected at most one part a row, came {parts} parts of {size} rows")
        cuts = edges(size, parts)
    return [slice(a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


def _rows(path: str, leaf: Any) -> int:
    if not isinstance(leaf, torch.Tensor) or leaf.dim() == 0:
        came = "a tensor of shape ()" if isinstance(leaf, torch.Tensor) else f"{type(leaf).__name__} {leaf!r}"
        raise ValueError(f"accumulate: {path}: expected a tensor of (B, ...) to cut in parts, came {came}")
    return leaf.shape[0]
