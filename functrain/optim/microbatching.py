"""Functions of a batch, run on parts of it one after another, and what becomes of the parts' results.

B rows in a batch, m in a part, n = B / m parts.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.transforms import value_and_grad, vmap
from functrain.tree import Tree
from functrain.tree.nodes import children, rebuild, signature

Axes: TypeAlias = int | Sequence[int | None]


@dataclasses.dataclass(frozen=True)
class Accumulator:
    """How results of parts become one: `finalize(update(... update(init(x_0), x_0, 0) ..., x_i, i))`.

    `init` looks at the shapes and dtypes of its argument only; `aggregate` is what `micro_vmap` does with the stacked
    results of one part's rows. All four take and return trees.
    """

    init: Callable[[Tree], Tree]
    update: Callable[[Tree, Tree, int], Tree]
    finalize: Callable[[Tree], Tree]
    aggregate: Callable[[Tree], Tree]


class AccumulationType(enum.Enum):
    """Ways to accumulate: the mean, the sum, the mean of the parts that were run, all along the first dimension."""

    MEAN = enum.auto()
    SUM = enum.auto()
    RUNNING_MEAN = enum.auto()
    CONCAT = enum.auto()


# one of the two, or a tree of them that is a prefix of what the function returns
Accumulators: TypeAlias = Accumulator | AccumulationType | Tree


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
    """
    if out_axes != 0:
        raise ValueError(f"micro_vmap: expected out_axes=0, came {out_axes}; move the dimension afterwards")

    def mapped(*args: Any, **kwargs: Any) -> Tree:
        axes = [*([in_axes] * len(args) if isinstance(in_axes, int) else in_axes)]
        axes += [None] * (len(args) - len(axes))

        def reduced(*args: Any, kwargs: dict[str, Any]) -> Tree:
            return _compose(accumulator, 1).aggregate(_rows(fun, vmap_fn, axes, args, kwargs))

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
    way = _compose(accumulators, parts)
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


def _compose(accumulators: Accumulators, parts: int) -> Accumulator:
    """Return one accumulator of trees that has a prefix of accumulators in it."""
    chosen = _at_leaves(lambda way: _of_type(way, parts), accumulators)
    return Accumulator(
        lambda values: _at_leaves(lambda way, value: way.init(value), chosen, values),
        lambda carry, values, i: _at_leaves(lambda way, c, value: way.update(c, value, i), chosen, carry, values),
        lambda carry: _at_leaves(lambda way, c: way.finalize(c), chosen, carry),
        lambda values: _at_leaves(lambda way, value: way.aggregate(value), chosen, values),
    )


def _at_leaves(fn: Callable[..., Any], prefix: Accumulators, *others: Tree) -> Tree:
    if isinstance(prefix, (Accumulator, AccumulationType)):
        return fn(prefix, *others)
    below = children(prefix)
    if below is None:
        raise TypeError(f"microbatch: expected an Accumulator or an AccumulationType, came {prefix!r}")
    for other in others:
        if len(children(other) or ()) != len(below) or (type(prefix) is dict and signature(prefix) != signature(other)):
            raise ValueError(
                f"microbatch: the accumulator has {len(below)} parts where the function returns "
                f"{type(other).__name__}; give one for it, or a tree that begins as the result does"
            )
    rows = zip(*[[child for _, child in children(node) or ()] for node in (prefix, *others)], strict=True)
    return rebuild(others[0] if others else prefix, [_at_leaves(fn, *row) for row in rows])


def _of_type(way: Accumulator | AccumulationType, parts: int) -> Accumulator:
    if isinstance(way, Accumulator):
        return way
    if way is AccumulationType.SUM:
        return Accumulator(tree.zeros_like, _add, _keep, lambda values: tree.map(lambda x: torch.sum(x, 0), values))
    if way is AccumulationType.CONCAT:
        # the parts as a list, whose one new item a step copies nothing
        return Accumulator(
            lambda values: [tree.zeros_like(values)] * parts,
            lambda carry, values, i: [*carry[:i], values, *carry[i + 1 :]],
            lambda carry: tree.map(lambda *xs: _concat(xs), *carry),
            _keep,
        )
    if way is AccumulationType.MEAN:
        return Accumulator(_floating_zeros, _add, lambda carry: tree.map(lambda c: c / parts, carry), _mean)
    return Accumulator(_floating_zeros, _running_mean, _keep, _mean)


def _keep(values: Tree) -> Tree:
    return values


def _add(carry: Tree, values: Tree, index: int) -> Tree:
    return tree.add(carry, values)


def _running_mean(carry: Tree, values: Tree, index: int) -> Tree:
    return tree.map(lambda old, new: old * (index / (index + 1)) + new * (1 / (index + 1)), carry, values)


def _mean(values: Tree) -> Tree:
    return tree.map(lambda x: torch.mean(x, 0), values)


def _floating_zeros(values: Tree) -> Tree:
    for path, leaf in tree.items(values):
        if not (leaf.is_floating_point() or leaf.is_complex()):
            raise ValueError(
                f"microbatch: {path or 'the result'}: expected floating-point numbers for a mean, came {leaf.dtype}; "
                "accumulate it with SUM or CONCAT"
            )
    return tree.zeros_like(values)


def _concat(parts: tuple[Tensor, ...]) -> Tensor:
    stacked = torch.stack(parts)  # (n, m, ...)
    # row b was in part b % n
    return stacked if stacked.dim() == 1 else stacked.transpose(0, 1).flatten(0, 1)
