"""The contract of every optimizer: a pair of pure functions over trees of updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch

import functrain.tree as tree
from functrain.transforms.gradient_checks import check_no_module
from functrain.tree import Params, Tree

Updates: TypeAlias = Any  # a tree like params: gradients on the way in, what to add to params on the way out
OptState: TypeAlias = Any  # a tree of tensors


class TransformInitFn(Protocol):
    """Make the first state for these params, on their device."""

    def __call__(self, params: Params) -> OptState: ...


class TransformUpdateFn(Protocol):
    """Turn updates into better ones: (updates, state, params) to (updates, state)."""

    def __call__(self, updates: Updates, state: OptState, params: Params | None = None) -> tuple[Updates, OptState]: ...


class TransformUpdateExtraArgsFn(Protocol):
    """Turn updates into better ones, with arguments by keyword, such as the loss; unknown ones are passed over."""

    def __call__(
        self, updates: Updates, state: OptState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, OptState]: ...


class GradientTransformation(NamedTuple):
    """A pair of pure functions: `init(params) -> state` and `update(updates, state, params) -> (updates, state)`."""

    init: Callable[..., OptState]
    update: Callable[..., tuple[Updates, OptState]]


class GradientTransformationExtraArgs(GradientTransformation):
    """A gradient transformation whose update takes arguments by keyword, and passes over those it does not know."""


class EmptyState(NamedTuple):
    """The state of a transformation that remembers nothing."""


def init_empty_state(params: Params) -> EmptyState:
    """Return the empty state.

    >>> ft.optim.init_empty_state({"w": torch.zeros(2)})
    EmptyState()
    """
    return EmptyState()


def with_extra_args_support(tx: GradientTransformation) -> GradientTransformationExtraArgs:
    """Make a transformation pass over keyword arguments that it does not know.

    >>> tx = ft.optim.with_extra_args_support(ft.optim.scale(-1.0))
    >>> tx.update(torch.tensor([2.0]), tx.init(torch.zeros(1)), value=torch.tensor(0.5))[0]
    tensor([-2.])
    """
    if isinstance(tx, GradientTransformationExtraArgs):
        return tx

    def update(
        updates: Updates, state: OptState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, OptState]:
        return tx.update(updates, state, params)

    return GradientTransformationExtraArgs(tx.init, update)


def identity() -> GradientTransformation:
    """Leave updates as they are. The neutral element of `chain`.

    >>> tx = ft.optim.identity()
    >>> tx.update(torch.tensor([1.0, -2.0]), tx.init(torch.zeros(2)))
    (tensor([ 1., -2.]), EmptyState())
    """

    def update(updates: Updates, state: EmptyState, params: Params | None = None) -> tuple[Updates, EmptyState]:
        return updates, state

    return GradientTransformation(init_empty_state, update)


def set_to_zero() -> GradientTransformation:
    """Set updates to zero, so that params stay as they are.

    >>> tx = ft.optim.set_to_zero()
    >>> tx.update(torch.tensor([1.0, -2.0]), tx.init(torch.zeros(2)))[0]
    tensor([0., 0.])
    """

    def update(updates: Updates, state: EmptyState, params: Params | None = None) -> tuple[Updates, EmptyState]:
        return tree.map(torch.zeros_like, updates), state

    return GradientTransformation(init_empty_state, update)


def stateless(f: Callable[[Updates, Params | None], Updates]) -> GradientTransformation:
    """Make a transformation of a function of (updates, params).

    >>> tx = ft.optim.stateless(lambda updates, params: ft.tree.map(torch.tanh, updates))
    >>> tx.update({"w": torch.tensor([0.0, 1.0])}, tx.init({"w": torch.zeros(2)}))[0]
    {'w': tensor([0.0000, 0.7616])}
    """

    def update(updates: Updates, state: EmptyState, params: Params | None = None) -> tuple[Updates, EmptyState]:
        return f(updates, params), EmptyState()

    return GradientTransformation(init_empty_state, update)


def stateless_with_tree_map(f: Callable[[Any, Any], Any]) -> GradientTransformation:
    """Make a transformation of a function of one leaf of updates and one of params, None where there are no params.

    >>> tx = ft.optim.stateless_with_tree_map(lambda update, param: update * param.abs())
    >>> params = {"w": torch.tensor([1.0, -2.0])}
    >>> tx.update({"w": torch.ones(2)}, tx.init(params), params)[0]
    {'w': tensor([1., 2.])}
    """

    def update(updates: Updates, state: EmptyState, params: Params | None = None) -> tuple[Updates, EmptyState]:
        if params is None:
            return tree.map(lambda leaf: f(leaf, None), updates), EmptyState()
        return tree.map(f, updates, params), EmptyState()

    return GradientTransformation(init_empty_state, update)


def check_params(params: Params | None, name: str) -> None:
    """Raise a ValueError when a transformation that reads params was not given them."""
    if params is None:
        raise ValueError(f"{name} needs the current params: call update(updates, state, params)")


def check_trainable(params: Tree) -> None:
    """Raise a TypeError that names the first leaf that cannot have a gradient."""
    if all(_is_trainable(leaf) for leaf in tree.leaves(params)):
        return
    path, leaf = next((path, leaf) for path, leaf in tree.items(params) if not _is_trainable(leaf))
    check_no_module(path or "params", leaf)
    raise TypeError(
        f"{path}: expected a floating-point parameter, came {getattr(leaf, 'dtype', type(leaf).__name__)}; "
        f"leave it out with masked(transform, mask), or keep it apart with tree.partition"
    )


def check_real(values: Tree, name: str) -> None:
    """Raise a TypeError that names the first complex leaf, for what is defined for real numbers only."""
    for path, leaf in tree.items(values):
        if isinstance(leaf, torch.Tensor) and leaf.is_complex():
            raise TypeError(
                f"{name}: {path or 'the leaf'} is complex; wrap it in split_real_and_imaginary, "
                f"as in ft.optim.split_real_and_imaginary({name}(...))"
            )


def _is_trainable(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def check_kind(what: str, state: OptState, kind: type) -> None:
    """Raise a ValueError for a state that another transformation made."""
    if not isinstance(state, kind):
        raise ValueError(
            f"{what}: expected a {kind.__name__}, came a state of type {type(state).__name__}; pass the state that the "
            "same optimizer's init made of these params"
        )


def check_own_state(what: str, state: OptState, own: OptState) -> None:
    """Raise a ValueError unless a state has the structure and shapes of `own`, which the transformation itself made."""
    (leaves, structure), (own_leaves, own_structure) = tree.flatten(state), tree.flatten(own)
    way_out = "pass the state that the same optimizer's init made of these params"
    if structure != own_structure:
        expected, came = (f"{type(x).__name__} of {tree.paths(x)[:8]}" for x in (own, state))
        raise ValueError(f"{what}: expected a state of its own, {expected}, came {came}; {way_out}")
    for i, (leaf, new) in enumerate(zip(leaves, own_leaves, strict=True)):
        if leaf.shape != new.shape:
            raise ValueError(
                f"{what}: {tree.paths(state)[i]}: expected a state of shape {tuple(new.shape)}, came "
                f"{tuple(leaf.shape)}; {way_out}"
            )
