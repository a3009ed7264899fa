"""Functions of a batch, run on parts of it one after another.

B rows in a batch, m in a part, n = B / m parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

import functrain.tree as tree
from functrain.optim.numerics.accumulators import AccumulationType, Accumulator, Accumulators, compose
from functrain.transforms import value_and_grad, vmap
from functrain.tree import Tree, elsewhere

__all__ = [
    "AccumulationType", "Accumulator", "Accumulators", "Axes", "IndividualOutputs", "compose", "micro_grad",
    "micro_vmap", "microbatch", "reshape_batch_axis",
]  # fmt: skip

Axes: TypeAlias = int | Sequence[int | None]


class IndividualOutputs(NamedTuple):
    values: Tensor  # (B,): the function's
    metrics: Tree  # (B, ...): of metrics_fn
    aux: Tree  # (B, ...): the function's


def reshape_batch_axis(tree: Tree, microbatch_size: int, dim: int = 0) -> Tree:
    """Return the tree with dimension `dim` of every leaf cut into (parts, `microbatch_size`).

    Row b is in part b % n, so that a batch sharded along its rows stays so inside every part. Equals
    `optax.microbatching.reshape_batch_axis`.

    Shapes: (..., B, ...) to (..., n, m, ...).
    Raises: ValueError naming a leaf whose rows `microbatch_size` does not divide.

    >>> ft.optim.microbatching.reshape_batch_axis(torch.arange(6), microbatch_size=3)
    tensor([[0, 2, 4],
            [1, 3, 5]])
    """

    return _cut(tree, microbatch_size, dim)


def microbatch(
    fun: Callable[..., Tree],
    argnums: int | Sequence[int],
    microbatch_size: int | None,
    accumulator: Accumulators = AccumulationType.SUM,
    *,
    argnames: str | Sequence[str] = (),
    in_axes: Axes = 0,
    num_real_microbatches: int | Tensor | None = None,
) -> Callable[..., Tree]:
    """Make a function that runs `fun` on `microbatch_size` rows at a time and accumulates what it returns.

    The arguments at `argnums`, and those by the names `argnames`, are batches, with rows along `in_axes`, one for all
    or one for each; the others are given whole. After `num_real_microbatches` parts nothing is added: as an int they
    are not run, as a tensor they are run and not counted. Equals `optax.microbatch`.

    Raises: ValueError for batches of different numbers of rows, and where the size does not divide them.

    >>> sum_of_squares = lambda x: torch.sum(x**2)
    >>> ft.optim.microbatch(sum_of_squares, argnums=0, microbatch_size=2)(torch.arange(6.0))
    tensor(55.)
    """
    if microbatch_size is None:
        return fun
    size = microbatch_size
    positions = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    names = (argnames,) if isinstance(argnames, str) else tuple(argnames)
    dims: Any = (in_axes,) * (len(positions) + len(names)) if isinstance(in_axes, int) else tuple(in_axes)

    def microbatched(*args: Any, **kwargs: Any) -> Tree:
        keys: list[Any] = [*positions, *names]
        given: dict[Any, Any] = dict(enumerate(args)) | kwargs
        found = {leaf.shape[dim] for key, dim in zip(keys, dims, strict=True) for leaf in tree.leaves(given[key])}
        if len(found) != 1:
            raise ValueError(f"microbatch: expected batches of one number of rows, came {sorted(found)}")
        parts = found.pop() // size
        cut = {key: reshape_batch_axis(given[key], size, dim) for key, dim in zip(keys, dims, strict=True)}
        ways = dict(zip(keys, dims, strict=True))

        def run(index: int) -> Tree:
            part = given | {
                key: tree.map(lambda leaf, key=key: leaf.select(ways[key], index), cut[key]) for key in keys
            }
            return fun(*[part[i] for i in range(len(args))], **{name: part[name] for name in kwargs})

        return _accumulated(run, accumulator, parts, num_real_microbatches)

    return microbatched


def micro_vmap(
    fun: Callable[..., Tree],
    in_axes: Axes = 0,
    out_axes: int = 0,
    *,
    microbatch_size: int | None = None,
    vmap_fn: Callable[..., Callable[..., Any]] = vmap,
    accumulator: Accumulators = AccumulationType.CONCAT,
    num_real_microbatches: int | Tensor | None = None,
) -> Callable[..., Tree]:
    """Make a function that maps `fun` over rows, `microbatch_size` at a time, and accumulates what it returns.

    Equals `vmap(fun, in_axes)`, with reductions over rows in place of the rows where `accumulator` says so. Arguments
    by keyword are mapped along their first dimension. Equals `optax.microbatching.micro_vmap`.

    Raises: ValueError for out_axes other than 0.

    >>> squares = ft.optim.microbatching.micro_vmap(lambda x: x**2, microbatch_size=2)
    >>> squares(torch.arange(6.0))
    tensor([ 0.,  1.,  4.,  9., 16., 25.])
    """
    if out_axes != 0:
        raise ValueError(f"micro_vmap: expected out_axes=0, came {out_axes}; move the dimension afterwards")

    def mapped(*args: Any, **kwargs: Any) -> Tree:
        axes = [*([in_axes] * len(args) if isinstance(in_axes, int) else in_axes)]
        axes += [None] * (len(args) - len(axes))

        def reduced(*args: Any, kwargs: dict[str, Any]) -> Tree:
            return compose(accumulator, 1).aggregate(_rows(fun, vmap_fn, axes, args, kwargs))

        run = microbatch(
            reduced,
            [i for i, axis in enumerate(axes) if axis is not None],
            microbatch_size,
            accumulator,
            argnames="kwargs",
            in_axes=[*[axis for axis in axes if axis is not None], 0],
            num_real_microbatches=num_real_microbatches,
        )
        return run(*args, kwargs=kwargs)

    return mapped


def micro_grad(
    fun: Callable[..., Any],
    has_aux: bool = False,
    argnums: int | Sequence[int] = 0,
    *,
    batch_argnums: int | Sequence[int] = 1,
    keep_batch_dim: bool = True,
    microbatch_size: int | None = None,
    accumulator: Accumulators = AccumulationType.SUM,
    transform_fn: Callable[[Tree], Tree] = lambda grads: grads,
    metrics_fn: Callable[[Tree], Tree] = lambda grads: None,
    num_real_microbatches: int | Tensor | None = None,
) -> Callable[..., tuple[Tree, IndividualOutputs]]:
    """Make a function that returns the accumulated `transform_fn(gradient)` of each row, and what rows had to say.

    It is the way to clip, to square or to measure gradients of single examples without keeping them. With
    `keep_batch_dim` a row is a batch of one. Equals `optax.microbatching.micro_grad`.

    >>> loss = lambda params, x: torch.sum((params - x) ** 2)
    >>> grad_fn = ft.optim.microbatching.micro_grad(loss, microbatch_size=2, metrics_fn=ft.optim.global_norm)
    >>> grads, per_row = grad_fn(torch.tensor(0.0), torch.arange(4.0))
    >>> grads, per_row.metrics
    (tensor(-12.), tensor([0., 2., 4., 6.]))
    """
    rows = (batch_argnums,) if isinstance(batch_argnums, int) else tuple(batch_argnums)
    positions = argnums if isinstance(argnums, int) else tuple(argnums)
    with_aux = fun if has_aux else lambda *args, **kwargs: (fun(*args, **kwargs), None)
    both = value_and_grad(with_aux, argnums=positions, has_aux=True)

    def of_row(*args: Any, **kwargs: Any) -> tuple[Tree, IndividualOutputs]:
        (value, aux), grads = both(*args, **kwargs)
        return transform_fn(grads), IndividualOutputs(value, metrics_fn(grads), aux)

    of_rows = micro_vmap(
        of_row,
        [0 if i in rows else None for i in range(max(rows) + 1)],
        microbatch_size=microbatch_size,
        accumulator=(accumulator, AccumulationType.CONCAT),
        num_real_microbatches=num_real_microbatches,
    )

    def batches_of_one(*args: Any, **kwargs: Any) -> tuple[Tree, IndividualOutputs]:
        wide = [tree.map(lambda x: x.unsqueeze(1), arg) if i in rows else arg for i, arg in enumerate(args)]
        return of_rows(*wide, **kwargs)

    return batches_of_one if keep_batch_dim else of_rows


def _cut(batch: Tree, microbatch_size: int, dim: int) -> Tree:
    def reshape(path: str, leaf: Tensor) -> Tensor:
        rows = leaf.shape[dim]
        if microbatch_size < 1 or rows % microbatch_size:
            raise ValueError(
                f"microbatch: {path or 'the batch'}: {rows} rows are no multiple of microbatch_size={microbatch_size}; "
                f"choose a size that divides {rows}"
            )
        at = dim % leaf.dim()
        return leaf.unflatten(at, (microbatch_size, rows // microbatch_size)).transpose(at, at + 1)

    return tree.map_with_path(reshape, batch)


def _rows(
    fun: Callable[..., Tree], vmap_fn: Callable[..., Any], axes: list[int | None], args: Any, kwargs: dict[str, Any]
) -> Tree:
    """Run vmap on flat lists of tensors: torch.func walks trees by torch's own registry, not by ours."""
    found: list[Any] = []
    flat = [tree.flatten(arg) for arg in (*args, kwargs)]

    def of_row(*columns: list[Tensor]) -> list[Tensor]:
        *row, named = [tree.unflatten(structure, leaves) for leaves, (_, structure) in zip(columns, flat, strict=True)]
        leaves, structure = tree.flatten(fun(*row, **named))
        found.append(structure)
        return leaves

    leaves = vmap_fn(of_row, (*axes, 0), 0)(*[leaves for leaves, _ in flat])
    return tree.unflatten(found[-1], leaves)


def _accumulated(run: Callable[[int], Tree], accumulators: Accumulators, parts: int, real: int | Tensor | None) -> Tree:
    way = compose(accumulators, parts)
    turns = min(real, parts) if isinstance(real, int) else parts
    if turns < 1:
        raise ValueError(f"microbatch: expected at least one part to run, came {turns} of {parts}")
    carry: Any = None
    for index in range(turns):
        value = run(index)
        carry = way.init(value) if index == 0 else carry
        new = way.update(carry, value, index)
        carry = tree.where(index < real, new, carry) if isinstance(real, Tensor) else new
    return way.finalize(carry)


elsewhere.furnish(__name__)
