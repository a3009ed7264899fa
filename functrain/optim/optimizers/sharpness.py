"""SAM: descent from where the loss around is worst."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.clipping.norms import global_norm
from functrain.optim.numerics.safe import scaled, zero_count
from functrain.optim.transformation import (
    EmptyState,
    GradientTransformation,
    GradientTransformationExtraArgs,
    OptState,
    Updates,
    check_params,
    init_empty_state,
)
from functrain.optim.updating import apply_updates
from functrain.tree import Params

NormalizeState = EmptyState


class SAMState(NamedTuple):
    steps_since_sync: Tensor  # (), int64
    opt_state: OptState
    adv_state: OptState
    cache: Params | None  # a copy of the params before the adversarial steps; None in opaque mode


def normalize() -> GradientTransformation:
    """Divide updates by their global norm; updates that are all 0 stay 0.

    >>> tx = ft.optim.normalize()
    >>> tx.update(torch.tensor([3.0, 4.0]), tx.init(torch.zeros(2)))[0]
    tensor([0.6000, 0.8000])
    """

    def update(updates: Updates, state: EmptyState, params: Params | None = None) -> tuple[Updates, EmptyState]:
        norm = global_norm(updates)
        zero = norm == 0
        factor = torch.where(zero, 0.0, 1 / torch.where(zero, 1.0, norm))
        return tree.map(lambda g: scaled(g, factor), updates, by_kind=True), state

    return GradientTransformation(init_empty_state, update)


def sam(
    optimizer: GradientTransformation,
    adv_optimizer: GradientTransformation,
    sync_period: int = 2,
    reset_state: bool = True,
    opaque_mode: bool = False,
    batch_axis_name: str | None = None,
) -> GradientTransformationExtraArgs:
    """Climb with `adv_optimizer` for sync_period - 1 steps, then step back and descend with the gradient found there.

    Transparent, each update is one of those steps: the caller's gradients are taken wherever the params then are.
    With `opaque_mode`, one update is all of them, and takes `grad_fn=`, a function of (params, step) to gradients.

    Source: Foret et al. 2021 (arXiv:2010.01412), algorithm 1.

    Raises: ValueError for a period below 1, without params, without grad_fn in opaque mode, and for a batch axis: in
    torch it is grad_fn that reduces over ranks.

    >>> climb = ft.optim.chain(ft.optim.normalize(), ft.optim.sgd(0.5))
    >>> optimizer, params = ft.optim.sam(ft.optim.sgd(0.1), climb, opaque_mode=True), torch.tensor([1.0])
    >>> grad_fn = ft.grad(lambda params, step=0: torch.sum(params**2))
    >>> optimizer.update(grad_fn(params), optimizer.init(params), params, grad_fn=grad_fn)[0]  # 0.1 * the slope at 1.5
    tensor([-0.3000])
    """
    if sync_period < 1:
        raise ValueError(f"sam: sync_period must be at least 1, came {sync_period}")
    if batch_axis_name is not None:
        raise ValueError("sam: torch has no named axes; let grad_fn reduce the gradients over ranks")

    def init(params: Params) -> SAMState:
        cache = None if opaque_mode else tree.map(torch.clone, params)
        return SAMState(zero_count(params), optimizer.init(params), adv_optimizer.init(params), cache)

    def transparent(
        updates: Updates, state: SAMState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, SAMState]:
        check_params(params, "sam")
        first, last = state.steps_since_sync == 0, state.steps_since_sync == sync_period - 1
        climb, adv_state = adv_optimizer.update(updates, state.adv_state, params)
        descend, opt_state = optimizer.update(updates, state.opt_state, state.cache)
        back = tree.map(lambda c, p, u: c - p + u, state.cache, params, descend, by_kind=True)
        new = tree.map(lambda b, c: torch.where(last, b, -c), back, climb, by_kind=True)
        kept = adv_optimizer.init(params) if reset_state else state.adv_state
        return new, SAMState(
            (state.steps_since_sync + 1) % sync_period,
            tree.where(last, opt_state, state.opt_state),
            tree.where(last, kept, adv_state),
            tree.where(first, params, state.cache),
        )

    def opaque(
        updates: Updates,
        state: SAMState,
        params: Params | None = None,
        *,
        grad_fn: Callable[[Params, int], Updates] | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, SAMState]:
        check_params(params, "sam")
        if grad_fn is None:
            raise ValueError("sam in opaque mode needs update(..., grad_fn=function of (params, step) to gradients)")
        adv_state, there = state.adv_state, params
        for i in range(sync_period - 1):
            climb, adv_state = adv_optimizer.update(updates, adv_state, there)
            there = apply_updates(there, tree.map(torch.neg, climb))
            updates = grad_fn(there, i)
        adv_state = adv_optimizer.init(params) if reset_state else adv_state
        new, opt_state = optimizer.update(updates, state.opt_state, params)
        return new, SAMState(torch.zeros_like(state.steps_since_sync), opt_state, adv_state, None)

    return GradientTransformationExtraArgs(init, opaque if opaque_mode else transparent)
