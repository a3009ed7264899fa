"""Steps that are not taken, because their loss stands out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.numerics.safe import like, working_dtype, zero_count
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    OptState,
    Updates,
    with_extra_args_support,
)
from functrain.schedules import Scalar
from functrain.tree import Params


class SkipLossSpikesState(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # (), int64: finite losses so far
    losses: Tensor  # (window,), float32 or float64: the last of them, in a ring
    skipped: Tensor  # (), int64: updates that were made 0
    inner_state: OptState


def stands_out(loss: Tensor, losses: Tensor, count: Tensor, deviations: Scalar) -> Tensor:
    """Tell whether a loss is more than so many standard deviations above the mean of a window of losses, ().

    Of `losses` (window,) the first `count` are there, all where `count` is more. None stands out before half a window,
    and two losses, are there.
    """
    window = len(losses)
    seen, number = torch.arange(window, device=losses.device) < count, torch.clamp(count, max=window)
    mean = torch.sum(torch.where(seen, losses, 0.0)) / torch.clamp(number, min=1)
    square = torch.sum(torch.where(seen, (losses - mean) ** 2, 0.0)) / torch.clamp(number - 1, min=1)
    far = loss - mean > like(deviations, square) * torch.sqrt(square)
    return (count >= max(2, window // 2)) & far


def skip_loss_spikes(
    inner: GradientTransformation, window: int = 128, sigma_factor: Scalar = 6.0
) -> GradientTransformationExtraArgs:
    """Apply `inner`, but make updates 0 and keep its state where the loss is a spike or not finite.

    `update` takes the loss as `value=`, and hands it on. A spike is more than `sigma_factor` standard deviations above
    the mean of the last `window` finite losses. Nothing is one before half a window, and two losses, are seen. A spike
    enters the window too: a loss that stays high is soon none.

    Source: the skip-step optimizer of OLMo 2 (arXiv:2501.00656).

    Raises: ValueError for a window below 2, and without `value`.

    >>> optimizer, params = ft.optim.skip_loss_spikes(ft.optim.sgd(0.1), window=4), torch.zeros(1)
    >>> state = optimizer.init(params)
    >>> for loss in [1.0, 1.1, 1.0, 50.0]:
    ...     updates, state = optimizer.update(torch.ones(1), state, params, value=torch.tensor(loss))
    >>> updates
    tensor([0.])
    """
    if not isinstance(window, int) or window < 2:
        raise ValueError(f"skip_loss_spikes: expected a window of at least 2 losses, came {window!r}")
    inner = with_extra_args_support(inner)

    def init(params: Params) -> SkipLossSpikesState:
        zero = zero_count(params)
        losses = torch.zeros(window, dtype=working_dtype(params), device=zero.device)
        return SkipLossSpikesState(zero, losses, zero.clone(), inner.init(params))

    def update(
        updates: Updates,
        state: SkipLossSpikesState,
        params: Params | None = None,
        value: Scalar | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, SkipLossSpikesState]:
        if value is None:
            raise ValueError("skip_loss_spikes needs the loss: call update(updates, state, params, value=loss)")
        losses, count = state.losses, state.count
        loss = torch.as_tensor(value, dtype=losses.dtype, device=losses.device)
        places = torch.arange(window, device=losses.device)
        finite = torch.isfinite(loss)
        act = finite & ~stands_out(loss, losses, count, sigma_factor)
        new, inner_state = inner.update(updates, state.inner_state, params, value=value, **extra_args)
        return tree.map(lambda u: torch.where(act, u, 0.0), new, by_kind=True), SkipLossSpikesState(
            count + finite,
            torch.where((places == count % window) & finite, loss, losses),
            state.skipped + ~act,
            tree.where(act, inner_state, state.inner_state),
        )

    return GradientTransformationExtraArgs(init, update)
