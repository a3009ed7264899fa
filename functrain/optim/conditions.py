"""Transformations that act only when they should."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.numerics.safe import zero_count
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    OptState,
    Updates,
    with_extra_args_support,
)
from functrain.tree import Params
from functrain.tree.reductions import finite, stays_finite

ConditionFn: TypeAlias = Callable[..., Any]  # of the step, and of keyword arguments if forwarded, to a () bool


class ConditionallyTransformState(NamedTuple):
    inner_state: OptState
    step: Tensor  # (), int64: updates so far


class ConditionallyMaskState(NamedTuple):
    step: Tensor  # (), int64: updates so far
    inner_state: OptState


class ApplyIfFiniteState(NamedTuple):
    notfinite_count: Tensor  # (), int64: updates in a row that were not finite
    last_finite: Tensor  # (), bool: whether the last one was finite
    total_notfinite: Tensor  # (), int64: updates that were not finite
    inner_state: OptState


def conditionally_transform(
    inner: GradientTransformation, should_transform_fn: ConditionFn, forward_extra_args: bool = False
) -> GradientTransformationExtraArgs:
    """Apply `inner` at the steps where `should_transform_fn(step)` is true; leave updates alone at the others.

    >>> tx = ft.optim.conditionally_transform(ft.optim.scale(10.0), lambda step: step >= 1)
    >>> first, state = tx.update(torch.tensor([1.0]), tx.init(torch.zeros(1)))
    >>> first, tx.update(torch.tensor([1.0]), state)[0]
    (tensor([1.]), tensor([10.]))
    """
    inner = with_extra_args_support(inner)

    def init(params: Params) -> ConditionallyTransformState:
        return ConditionallyTransformState(inner.init(params), zero_count(params))

    def update(
        updates: Updates, state: ConditionallyTransformState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, ConditionallyTransformState]:
        act = _condition(should_transform_fn, state.step, extra_args if forward_extra_args else {})
        new, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        inner_state = tree.where(act, inner_state, state.inner_state)
        return tree.where(act, new, updates), ConditionallyTransformState(inner_state, state.step + 1)

    return GradientTransformationExtraArgs(init, update)


def conditionally_mask(
    inner: GradientTransformation, should_transform_fn: ConditionFn, forward_extra_args: bool = False
) -> GradientTransformationExtraArgs:
    """Apply `inner` at the steps where `should_transform_fn(step)` is true; make updates 0 at the others.

    >>> tx = ft.optim.conditionally_mask(ft.optim.scale(10.0), lambda step: step >= 1)
    >>> first, state = tx.update(torch.tensor([1.0]), tx.init(torch.zeros(1)))
    >>> first, tx.update(torch.tensor([1.0]), state)[0]
    (tensor([0.]), tensor([10.]))
    """
    inner = with_extra_args_support(inner)

    def init(params: Params) -> ConditionallyMaskState:
        return ConditionallyMaskState(zero_count(params), inner.init(params))

    def update(
        updates: Updates, state: ConditionallyMaskState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, ConditionallyMaskState]:
        act = _condition(should_transform_fn, state.step, extra_args if forward_extra_args else {})
        new, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        inner_state = tree.where(act, inner_state, state.inner_state)
        return _or_zero(act, new), ConditionallyMaskState(state.step + 1, inner_state)

    return GradientTransformationExtraArgs(init, update)


def apply_if_finite(inner: GradientTransformation, max_consecutive_errors: int) -> GradientTransformationExtraArgs:
    """Apply `inner` where updates are finite, before it and after it, and its state stays so; else make updates 0.

    optax looks at the updates before it alone. Those that are made 0 are counted; after more than
    `max_consecutive_errors` in a row they are let through, so that what is wrong is seen.

    >>> optimizer = ft.optim.apply_if_finite(ft.optim.sgd(0.1), max_consecutive_errors=5)
    >>> updates, state = optimizer.update(torch.tensor([float("inf"), 1.0]), optimizer.init(torch.zeros(2)))
    >>> updates, state.total_notfinite
    (tensor([0., 0.]), tensor(1))
    """
    inner = with_extra_args_support(inner)

    def init(params: Params) -> ApplyIfFiniteState:
        zero = zero_count(params)
        return ApplyIfFiniteState(zero, torch.ones_like(zero, dtype=torch.bool), zero.clone(), inner.init(params))

    def update(
        updates: Updates, state: ApplyIfFiniteState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, ApplyIfFiniteState]:
        new, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        good = finite((updates, new)) & stays_finite(state.inner_state, inner_state)
        in_a_row = torch.where(good, 0, state.notfinite_count + 1)
        act = good | (in_a_row > max_consecutive_errors)
        return _or_zero(act, new), ApplyIfFiniteState(
            in_a_row, good, state.total_notfinite + ~good, tree.where(act, inner_state, state.inner_state)
        )

    return GradientTransformationExtraArgs(init, update)


def _condition(should: ConditionFn, step: Tensor, extra_args: dict[str, Any]) -> Tensor:
    return torch.as_tensor(should(step, **extra_args), dtype=torch.bool, device=step.device)


def _or_zero(act: Tensor, updates: Updates) -> Updates:
    return tree.map(lambda u: torch.where(act, u, 0.0), updates, by_kind=True)
