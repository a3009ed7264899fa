"""Averages of parameters, kept beside them by the optimizer: what is evaluated in place of the last parameters.

`ft.train.averaged(state)` finds them. They are part of the optimizer's state, so that a run that is started again goes
on with them, and a step that a guard skips leaves them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.numerics.safe import lerp, working_dtype, zero_count
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    OptState,
    Updates,
    check_kind,
    check_params,
    with_extra_args_support,
)
from functrain.optim.updating import apply_updates
from functrain.schedules import Scalar, ScalarOrSchedule
from functrain.schedules.schedule import check_number
from functrain.tree import Params


class ParamsEmaState(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far
    weight: Tensor  # (): sum of the weights of the params in the average, 1 where the first params are among them
    average: Params  # like params, float32 at least: their average
    inner_state: OptState


def keep_ema(
    inner: GradientTransformation, decay: ScalarOrSchedule = 0.999, *, debias: bool = True
) -> GradientTransformationExtraArgs:
    """Keep an exponential moving average (EMA) of the params that `inner` trains: decay * average + (1 - decay) * new.

    Updates are those of `inner`. With `debias` the params that training began from do not count: the weights of the
    others add up to 1, and after the first step the average is the new params. Without, it begins at the first params,
    as `torch.optim.swa_utils.AveragedModel` and timm's `ModelEma` do. `decay` may be a schedule of the updates so far:
    `ft.schedules.ema_warmup(0.9999)` grows to it.

    Goes around the whole optimizer, within `keep_master_copies` only. Half-precision params have a float32 average,
    which would stand still otherwise. A leaf that is no floating-point number, such as a count, is copied.

    Equals `optax.ema` of the params instead of the updates.

    >>> params, optimizer = torch.tensor([1.0]), ft.optim.keep_ema(ft.optim.sgd(0.5), decay=0.9, debias=False)
    >>> updates, state = optimizer.update(torch.tensor([1.0]), optimizer.init(params), params)
    >>> params + updates, state.average
    (tensor([0.5000]), tensor([0.9500]))
    """
    inner = with_extra_args_support(inner)
    constant = None if callable(decay) else check_number("keep_ema: decay", decay)
    if isinstance(constant, (int, float)) and not 0.0 <= constant < 1.0:
        raise ValueError(f"keep_ema: decay must be in [0, 1), came {decay}; 0.999 averages some thousand steps")

    def init(params: Params) -> ParamsEmaState:
        weight = torch.full_like(zero_count(params), 0.0 if debias else 1.0, dtype=working_dtype(params))
        return ParamsEmaState(zero_count(params), weight, _copies(params), inner.init(params))

    def update(
        updates: Updates, state: ParamsEmaState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, ParamsEmaState]:
        check_kind("keep_ema", state, ParamsEmaState)
        check_params(params, "keep_ema")
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        now: Scalar = decay(state.count) if callable(decay) else decay
        new_share = 1 - torch.as_tensor(now, dtype=state.weight.dtype, device=state.weight.device)
        weight = state.weight + new_share * (1 - state.weight)
        # of weight 0, as at a decay of 1, the average has nothing to divide by
        share = torch.where(weight > 0, new_share / torch.where(weight > 0, weight, 1.0), 0.0)
        average = tree.map(
            lambda old, new: lerp(old, new, share) if _moves(new) else new.clone(),
            state.average,
            apply_updates(params, updates),
            by_kind=True,
        )
        return updates, ParamsEmaState(state.count + 1, weight, average, inner_state)

    return GradientTransformationExtraArgs(init, update)


class ParamsMeanState(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far
    averaged: Tensor  # (), int64: how many params are in the mean; while it is 0, the mean is the last params
    average: Params  # like params, float32 at least: their mean
    inner_state: OptState


def keep_swa(inner: GradientTransformation, start: int, every: int = 1) -> GradientTransformationExtraArgs:
    """Keep the mean of the params after steps `start`, `start + every`, ...: stochastic weight averaging (SWA).

    Updates are those of `inner`; until `start` the mean is the last params. Goes around the whole optimizer, within
    `keep_master_copies` only, and keeps float32 for half-precision params. Running statistics, such as those of a batch
    norm, belong to other params than the mean: run the training batches through `averaged(state)` once more.

    Equals `torch.optim.swa_utils.AveragedModel` updated after these steps. Source: Izmailov et al. 2018
    (arXiv:1803.05407), algorithm 1.

    Raises: ValueError for a start or a period below 1.

    >>> params, optimizer = torch.tensor([3.0]), ft.optim.keep_swa(ft.optim.sgd(1.0), start=1)
    >>> state = optimizer.init(params)
    >>> for _ in range(2):
    ...     updates, state = optimizer.update(torch.tensor([1.0]), state, params)
    ...     params = params + updates
    >>> params, state.average
    (tensor([1.]), tensor([1.5000]))
    """
    for name, value in (("start", start), ("every", every)):
        if type(value) is not int or value < 1:
            raise ValueError(f"keep_swa: expected {name} of at least 1 step, came {value!r}")
    inner = with_extra_args_support(inner)

    def init(params: Params) -> ParamsMeanState:
        return ParamsMeanState(zero_count(params), zero_count(params), _copies(params), inner.init(params))

    def update(
        updates: Updates, state: ParamsMeanState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, ParamsMeanState]:
        check_kind("keep_swa", state, ParamsMeanState)
        check_params(params, "keep_swa")
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        count = state.count + 1
        counts = (count >= start) & ((count - start) % every == 0)
        averaged = state.averaged + counts
        share = 1 / torch.clamp(averaged, min=1).to(working_dtype(params))

        def moved(old: Tensor, new: Tensor) -> Tensor:
            mean = lerp(old, new, share) if _moves(new) else new.clone()
            return torch.where(counts | (averaged == 0), mean, old)

        average = tree.map(moved, state.average, apply_updates(params, updates), by_kind=True)
        return updates, ParamsMeanState(count, averaged, average, inner_state)

    return GradientTransformationExtraArgs(init, update)


def _copies(params: Params) -> Params:
    # float32: an average in bfloat16 takes no step below a 512th of itself
    wide = lambda p: torch.promote_types(p.dtype, torch.float32) if _moves(p) else p.dtype  # noqa: E731
    return tree.map(lambda p: p.to(wide(p), copy=True), params)


def _moves(leaf: Tensor) -> bool:
    return leaf.is_floating_point() or leaf.is_complex()
