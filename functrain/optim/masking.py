"""Transformations that see some leaves only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import functrain.tree as tree
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    OptState,
    Updates,
    check_kind,
    set_to_zero,
    with_extra_args_support,
)
from functrain.tree import Params, Tree

Mask: TypeAlias = Tree | Callable[[Params], Tree]  # booleans like params or a prefix of them, or what makes such a tree
MaskOrFn: TypeAlias = Mask | None


class MaskedState(NamedTuple):
    inner_state: OptState  # the inner state, made for the leaves that it sees


class MaskedNode(NamedTuple):
    """Stands where a leaf is masked out; a node without leaves."""


class ParamsPlaceholder(NamedTuple):
    """Stands for all of params in the `init` of `tree_map_params`; a node without leaves."""


def masked(
    inner: GradientTransformation, mask: Mask, *, mask_compatible_extra_args: bool = False
) -> GradientTransformationExtraArgs:
    """Apply `inner` where the mask is True, and leave the other updates as they are.

    Equals `inner` where all is True, and `identity` where all is False. `mask_compatible_extra_args` masks keyword
    arguments that are trees like the updates.

    Raises: TypeError naming the leaf of the mask that is no bool; ValueError or KeyError naming the path where mask and
    updates do not fit.

    >>> params = {"w": torch.tensor([3.0]), "b": torch.tensor([3.0])}
    >>> tx = ft.optim.masked(ft.optim.clip(1.0), {"w": True, "b": False})
    >>> tx.update(params, tx.init(params))[0]
    {'w': tensor([1.]), 'b': tensor([3.])}
    """
    inner = with_extra_args_support(inner)

    def init(params: Params) -> MaskedState:
        if isinstance(params, ParamsPlaceholder):  # a mask fits the real params only
            return MaskedState(inner.init(params))
        return MaskedState(inner.init(_hide(params, full_mask(mask, params))))

    def update(
        updates: Updates, state: MaskedState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, MaskedState]:
        check_kind("masked", state, MaskedState)
        keep = full_mask(mask, updates)
        if mask_compatible_extra_args:
            same = tree.structure(updates)
            extra_args = {k: _hide(v, keep) if tree.structure(v) == same else v for k, v in extra_args.items()}
        hidden = _hide(updates, keep)
        new, inner_state = inner.update(
            hidden, state.inner_state, None if params is None else _hide(params, keep), **extra_args
        )
        tree.check_same_structure(hidden, new, what="masked: updates before and after the inner transformation")
        kept = iter(tree.leaves(new))
        return tree.map(lambda m, old: next(kept) if m else old, keep, updates), MaskedState(inner_state)

    return GradientTransformationExtraArgs(init, update)


def freeze(mask: Mask) -> GradientTransformationExtraArgs:
    """Set updates to zero where the mask is True.

    >>> params = {"body": torch.ones(1), "head": torch.ones(1)}
    >>> optimizer = ft.optim.chain(ft.optim.sgd(0.1), ft.optim.freeze({"body": True, "head": False}))
    >>> optimizer.update(params, optimizer.init(params), params)[0]
    {'body': tensor([0.]), 'head': tensor([-0.1000])}
    """
    return masked(set_to_zero(), mask)


def full_mask(mask: Mask, updates: Updates) -> Tree:
    """Return the tree of booleans like updates that a mask stands for."""
    given = made_for(mask, updates)
    full = broadcast_prefix(given, updates)
    for path, leaf in tree.items(full):
        if not isinstance(leaf, bool):
            raise TypeError(f"mask: {path}: expected True or False, came {leaf!r}; masks are fixed when traced")
    return full


def made_for(given: Tree | Callable[[Params], Tree], params: Params) -> Tree:
    """Return a tree, or what a function makes of the params: a node of a class with `__call__` is a tree."""
    return given(params) if callable(given) and tree.children(given) is None else given


def broadcast_prefix(prefix: Tree, full: Tree) -> Tree:
    """Return a tree like `full` whose every leaf is the leaf of `prefix` at its own path or above it.

    Raises: ValueError naming a path of `full` for which there is none; KeyError naming one that `full` lacks.
    """
    if tree.structure(prefix) == tree.structure(full):
        return prefix
    values = dict(tree.items(prefix))
    for path in values:
        tree.at(full, path)  # a misspelled path must not be passed over
    return tree.map_with_path(lambda path, _: values[_above(path, values)], full)


def _above(path: str, values: dict[str, Any]) -> str:
    at = path
    while at not in values:
        if not at:
            raise ValueError(f"mask: nothing for {path!r}; there is {sorted(values)}")
        at = at.rpartition("/")[0]
    return at


def _hide(values: Tree, keep: Tree) -> Tree:
    return tree.map(lambda m, value: value if m else MaskedNode(), keep, values)
