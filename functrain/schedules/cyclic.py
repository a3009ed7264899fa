"""Cyclical schedules: lines up and down, again and again.

Source: Smith 2017, Cyclical learning rates (arXiv:1506.01186).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from functrain.schedules.schedule import Count, Scalar, Schedule, steps_of


def triangular_schedule(
    init_value: Scalar, peak_value: Scalar, up_steps: int, down_steps: int | None = None
) -> Schedule:
    """Rise to `peak_value` in `up_steps` and fall back in `down_steps`, or in as many, and again.

    Equals `torch.optim.lr_scheduler.CyclicLR(mode="triangular")`.

    >>> schedule = ft.schedules.triangular_schedule(0.0, 1.0, up_steps=2)
    >>> schedule(torch.arange(7))
    tensor([0.0000, 0.5000, 1.0000, 0.5000, 0.0000, 0.5000, 1.0000],
           dtype=torch.float64)
    """
    return _cyclic(init_value, peak_value, up_steps, down_steps, lambda cycle, steps: torch.ones_like(steps))


def triangular2_schedule(
    init_value: Scalar, peak_value: Scalar, up_steps: int, down_steps: int | None = None
) -> Schedule:
    """Rise and fall as `triangular_schedule` does, half as high in every new cycle.

    Equals `torch.optim.lr_scheduler.CyclicLR(mode="triangular2")`.

    >>> schedule = ft.schedules.triangular2_schedule(0.0, 1.0, up_steps=2)
    >>> schedule(torch.arange(7))
    tensor([0.0000, 0.5000, 1.0000, 0.5000, 0.0000, 0.2500, 0.5000],
           dtype=torch.float64)
    """
    return _cyclic(init_value, peak_value, up_steps, down_steps, lambda cycle, steps: 0.5**cycle)


def exp_range_schedule(
    init_value: Scalar, peak_value: Scalar, up_steps: int, down_steps: int | None = None, gamma: Scalar = 1.0
) -> Schedule:
    """Rise and fall as `triangular_schedule` does, the height multiplied by `gamma` at every step.

    Equals `torch.optim.lr_scheduler.CyclicLR(mode="exp_range", gamma=gamma)`.

    >>> schedule = ft.schedules.exp_range_schedule(0.0, 1.0, up_steps=2, gamma=0.5)
    >>> schedule(torch.arange(7))
    tensor([0.0000, 0.2500, 0.2500, 0.0625, 0.0000, 0.0156, 0.0156],
           dtype=torch.float64)
    """
    return _cyclic(init_value, peak_value, up_steps, down_steps, lambda cycle, steps: gamma**steps)


def _cyclic(
    low: Scalar, high: Scalar, up: int, down: int | None, height: Callable[[Tensor, Tensor], Tensor]
) -> Schedule:
    down = up if down is None else down
    if up < 1 or down < 1:
        raise ValueError(f"a cyclical schedule needs at least one step up and one down, came {up} and {down}")

    def schedule(count: Count) -> Tensor:
        steps = steps_of(count)
        cycle = torch.floor(steps / (up + down))
        within = steps - cycle * (up + down)
        part = torch.where(within <= up, within / up, (up + down - within) / down)
        return low + (high - low) * part * height(cycle, steps)

    return schedule
