"""An optimizer as a function of one leaf."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.numerics.safe import squarable, within
from functrain.tree import Tree
from functrain.tree.by_kind import once_a_kind


def by_parts(step: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Make a `step` of `leafwise` treat a complex leaf as two real ones, its parts, as `torch.optim` does.

    The optimizer then equals itself in `split_real_and_imaginary`. A step without it sees the complex numbers.
    """

    def step_of(*leaves: Tensor) -> tuple[Any, ...]:
        if not leaves[0].is_complex():
            return step(*leaves)
        parts = zip(step(*[x.real for x in leaves]), step(*[x.imag for x in leaves]), strict=True)
        return tuple([torch.complex(real, imag) for real, imag in parts])

    return step_of


def leafwise(
    step: Callable[..., tuple[Any, ...]], updates: Tree, states: tuple[Tree, ...], *read: Tree
) -> tuple[Tree, tuple[Tree, ...]]:
    """Run `step` on each leaf: (update, *leaves of states, *leaves of read) to (update, *new leaves of states).

    `step` sees half precision as float32: in float16 the square of 1e-4 is 0 and that of 300 infinite, and so is an eps
    of 1e-8 0. The update of a half-precision leaf is rounded to its dtype, to the largest number of float16 where it is
    larger; a new leaf of a state is kept in the dtype of the old one. All of a leaf's work is done before the next
    leaf's, while it is in the cache. Where `ft.compile` looks at it, `step` runs once for leaves of one kind, see
    `tree.by_kind`.

    Raises: ValueError naming the paths in which the trees differ, or a leaf that does not keep its shape, because a
    state, update or parameter of another shape was broadcast to it.
    """
    leaves, structure = tree.flatten(updates)
    columns = [leaves]
    for other in (*states, *read):
        tree.check_same_structure(other, updates, what="updates, against what they are for")
        columns.append(tree.leaves(other))
    if not leaves:
        return updates, states
    step = once_a_kind(step)
    made = list(zip(*[step(*map(_wide, row)) for row in zip(*columns, strict=True)], strict=True))
    for column, before in zip(made, columns, strict=False):  # what is only read is not made anew
        for at, (new, old) in enumerate(zip(column, before, strict=True)):
            if new.shape != old.shape:
                _refuse(updates, columns, at)
    new_updates = [_narrow(new, old) for new, old in zip(made[0], leaves, strict=True)]
    kept = [
        [new.to(old.dtype) for new, old in zip(column, before, strict=True)]
        for column, before in zip(made[1:], columns[1 : 1 + len(states)], strict=True)
    ]
    return tree.unflatten(structure, new_updates), tuple([tree.unflatten(structure, column) for column in kept])


def leafwise_squares(
    step: Callable[..., tuple[Any, ...]], updates: Tree, states: tuple[Tree, ...], *read: Tree
) -> tuple[Tree, tuple[Tree, ...]]:
    """Do what `leafwise` does, for a step that squares the elements of updates: none is too large for it.

    A moment that was infinite once would stay so, and its leaf where it is.
    """
    return leafwise(lambda g, *rest: step(squarable(g), *rest), updates, states, *read)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _narrow(update: Tensor, leaf: Tensor) -> Tensor:
    if leaf.dtype == torch.float16:
        return within(update, torch.finfo(torch.float16).max).to(torch.float16)
    return update.to(leaf.dtype) if leaf.dtype == torch.bfloat16 else update


def _refuse(updates: Tree, columns: list[list[Any]], at: int) -> None:
    path, update = list(tree.items(updates))[at]
    came = ", ".join(str(tuple(column[at].shape)) for column in columns[1:])
    raise ValueError(
        f"{path or 'the root'}: expected states and params that fit an update of shape {tuple(update.shape)}, "
        f"came {came}; pass the state that the same optimizer's init made of these params"
    )
