"""How results of the parts of a batch become one."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.tree import Tree
from functrain.tree.nodes import children, rebuild, signature


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


def compose(accumulators: Accumulators, parts: int) -> Accumulator:
    """Return one accumulator of trees that has a prefix of accumulators in it.

    >>> both = compose((AccumulationType.SUM, AccumulationType.MEAN), parts=2)
    >>> both.aggregate((torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])))
    (tensor(3.), tensor(1.5000))
    """
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
