"""A learning rate that shrinks when the loss stands still."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.numerics.safe import (
    device_of,
    like,
    working_dtype,
    zero_count,
)
from functrain.optim.transformation import (
    GradientTransformationExtraArgs,
    Updates,
)
from functrain.schedules import Scalar
from functrain.tree import Params


class ReduceLROnPlateauState(NamedTuple):
    scale: Tensor  # (): the factor now
    best_value: Tensor  # (): the smallest average loss
    plateau_count: Tensor  # (), int64: averages since it
    cooldown_count: Tensor  # (), int64: averages still to pass over
    count: Tensor  # type: ignore[assignment]  # (), int64: losses in avg_value
    avg_value: Tensor  # (): their average


def reduce_on_plateau(
    factor: Scalar = 0.1,
    patience: int = 10,
    rtol: Scalar = 1e-4,
    atol: Scalar = 0.0,
    cooldown: int = 0,
    accumulation_size: int = 1,
    min_scale: Scalar = 0.0,
) -> GradientTransformationExtraArgs:
    """Multiply updates by a scale that is multiplied by `factor` after `patience` losses that are no better.

    `update` takes the loss as `value=`; `accumulation_size` losses are averaged first. Better is below
    best - rtol * |best| - atol; optax, and torch, have best in place of |best|, so that no negative loss is a plateau.
    Of positive losses it equals `torch.optim.lr_scheduler.ReduceLROnPlateau(patience=patience - 1)` stepped with each.

    Raises: ValueError for a factor outside (0, 1) and for tolerances that are negative, both 0, or above 1;
    tensors are not looked at.

    >>> optimizer = ft.optim.chain(ft.optim.sgd(1.0), ft.optim.reduce_on_plateau(factor=0.5, patience=2))
    >>> params, grads = torch.zeros(1), torch.ones(1)
    >>> state = optimizer.init(params)
    >>> for loss in [3.0, 2.0, 2.0, 2.0]:
    ...     updates, state = optimizer.update(grads, state, params, value=torch.tensor(loss))
    >>> updates
    tensor([-0.5000])
    """
    if isinstance(factor, (int, float)) and not 0.0 < factor < 1.0:
        raise ValueError(f"reduce_on_plateau: factor must be in (0, 1), came {factor}")
    numbers = [x for x in (rtol, atol) if isinstance(x, (int, float))]
    if any(x < 0.0 for x in numbers) or numbers == [0.0, 0.0] or (isinstance(rtol, (int, float)) and rtol > 1.0):
        raise ValueError(f"reduce_on_plateau: need 0 <= rtol <= 1, atol >= 0 and not both 0, came {rtol} and {atol}")

    def init(params: Params) -> ReduceLROnPlateauState:
        zero = torch.zeros((), dtype=working_dtype(params), device=device_of(params))
        plateau, cool, count = [zero_count(params) for _ in range(3)]
        return ReduceLROnPlateauState(zero + 1, zero + float("inf"), plateau, cool, count, zero)

    def update(
        updates: Updates,
        state: ReduceLROnPlateauState,
        params: Params | None = None,
        *,
        value: Scalar,
        **extra_args: Any,
    ) -> tuple[Updates, ReduceLROnPlateauState]:
        count = state.count + 1
        loss = torch.as_tensor(value, dtype=state.avg_value.dtype, device=state.avg_value.device)
        mean = (state.count * state.avg_value + loss) / count
        full = count == accumulation_size
        judged = _judge(state, mean)
        kept = state._replace(count=count, avg_value=mean)
        state = ReduceLROnPlateauState(*[torch.where(full, new, old) for new, old in zip(judged, kept, strict=True)])
        return tree.map(lambda g: like(state.scale, g) * g, updates, by_kind=True), state

    def _judge(state: ReduceLROnPlateauState, mean: Tensor) -> ReduceLROnPlateauState:
        best = state.best_value
        margin = torch.where(best < 0, (1 + like(rtol, mean)) * best, (1 - like(rtol, mean)) * best)
        better = (mean < margin - like(atol, mean)) | (torch.isinf(best) & (mean < best))
        waited = torch.where(better, 0, state.plateau_count + 1)
        cooling = state.cooldown_count > 0
        shrink = ~cooling & (waited == patience)
        scale = torch.where(shrink, state.scale * like(factor, state.scale), state.scale)
        return ReduceLROnPlateauState(
            scale=torch.where(cooling, state.scale, torch.clamp(scale, min=like(min_scale, scale))),
            best_value=torch.where(better, mean, best),
            plateau_count=torch.where(cooling | shrink, 0, waited),
            cooldown_count=torch.where(cooling, state.cooldown_count - 1, torch.where(shrink, cooldown, 0)),
            count=torch.zeros_like(state.count),
            avg_value=torch.zeros_like(mean),
        )

    return GradientTransformationExtraArgs(init, update)
