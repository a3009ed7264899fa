"""Lookahead: k steps forward, one step back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.numerics.safe import (
    like,
    zero_count,
)
from functrain.optim.transformation import (
    GradientTransformation,
    OptState,
    Updates,
)
from functrain.schedules import Scalar
from functrain.tree import Params


class LookaheadState(NamedTuple):
    fast_state: OptState
    steps_since_sync: Tensor  # (), int64


class LookaheadParams(NamedTuple):
    """Parameters under `lookahead`: the fast ones, and the slow ones that follow."""

    fast: Params  # what the fast optimizer moves, and the loss reads
    slow: Params  # what follows it every sync_period steps

    @classmethod
    def init_synced(cls, params: Params) -> LookaheadParams:
        """Return a pair that starts at the same place."""
        return cls(params, tree.map(torch.clone, params))


def lookahead(
    fast_optimizer: GradientTransformation, sync_period: int, slow_step_size: Scalar, reset_state: bool = False
) -> GradientTransformation:
    """Move the fast params, and every `sync_period` steps both fast and slow to a point between them.

    `params` is a LookaheadParams; `updates` are gradients of the fast params, and the new updates are LookaheadParams.

    Source: Zhang et al. 2019 (arXiv:1907.08610), algorithm 1.

    Raises: ValueError for a period below 1; TypeError for params that are no LookaheadParams.

    >>> optimizer = ft.optim.lookahead(ft.optim.sgd(1.0), sync_period=1, slow_step_size=0.5)
    >>> params = ft.optim.LookaheadParams.init_synced(torch.tensor([4.0]))
    >>> updates, state = optimizer.update(torch.tensor([2.0]), optimizer.init(params), params)
    >>> ft.optim.apply_updates(params, updates)
    LookaheadParams(fast=tensor([3.]), slow=tensor([3.]))
    """
    if sync_period < 1:
        raise ValueError(f"lookahead: sync_period must be at least 1, came {sync_period}")

    def init(params: LookaheadParams) -> LookaheadState:
        return LookaheadState(fast_optimizer.init(_pair(params).fast), zero_count(params))

    def update(
        updates: Updates, state: LookaheadState, params: LookaheadParams | None = None
    ) -> tuple[LookaheadParams, LookaheadState]:
        fast, slow = _pair(params)
        updates, fast_state = fast_optimizer.update(updates, state.fast_state, fast)
        sync = state.steps_since_sync == sync_period - 1
        if reset_state:
            fast_state = tree.where(sync, fast_optimizer.init(fast), fast_state)

        def slow_update(u: Tensor, f: Tensor, s: Tensor) -> Tensor:
            return torch.where(sync, like(slow_step_size, s) * (f + u - s), 0.0)

        def fast_update(u: Tensor, f: Tensor, s: Tensor) -> Tensor:
            return u - torch.where(sync, like(1 - slow_step_size, s) * (f + u - s), 0.0)

        new = LookaheadParams(
            tree.map(fast_update, updates, fast, slow, by_kind=True),
            tree.map(slow_update, updates, fast, slow, by_kind=True),
        )
        return new, LookaheadState(fast_state, (state.steps_since_sync + 1) % sync_period)

    return GradientTransformation(init, update)


def _pair(params: Any) -> LookaheadParams:
    if not isinstance(params, LookaheadParams):
        raise TypeError(
            f"lookahead: expected LookaheadParams, came {type(params).__name__}; use LookaheadParams.init_synced"
        )
    return params
