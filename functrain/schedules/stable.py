"""Warm up, stay, decay: a schedule whose end is chosen late."""

from __future__ import annotations

import torch
from torch import Tensor

from functrain.schedules.schedule import Count, Scalar, Schedule, steps_of


def warmup_stable_decay_schedule(
    init_value: Scalar,
    peak_value: Scalar,
    warmup_steps: int,
    stable_steps: int,
    decay_steps: int,
    end_value: Scalar = 0.0,
    power: Scalar = 1.0,
) -> Schedule:
    """Rise in a straight line to `peak_value`, stay for `stable_steps`, then fall to `end_value` in `decay_steps`.

    The fall is that of 1 - part ** power: a line for 1, steep at first for 0.5, the "1 - sqrt" of Hägele et al. Until
    it begins the values do not depend on `stable_steps`, so that a run can be made longer, or a decay branched off.

    Source: Hu et al. 2024, MiniCPM (arXiv:2404.06395); Hägele et al. 2024 (arXiv:2405.18392).

    Raises: ValueError for a negative number of steps.

    >>> schedule = ft.schedules.warmup_stable_decay_schedule(0.0, 1.0, 10, stable_steps=80, decay_steps=10)
    >>> schedule(torch.tensor([0, 5, 10, 90, 95, 100]))
    tensor([0.0000, 0.5000, 1.0000, 1.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    if min(warmup_steps, stable_steps, decay_steps) < 0:
        raise ValueError(
            "warmup_stable_decay_schedule: expected numbers of steps of at least 0, came "
            f"{warmup_steps}, {stable_steps} and {decay_steps}"
        )

    def schedule(count: Count) -> Tensor:
        steps = steps_of(count)
        risen = torch.clamp(steps / max(warmup_steps, 1), 0, 1) if warmup_steps else torch.ones_like(steps)
        into = torch.clamp(steps - (warmup_steps + stable_steps), min=0)
        part = torch.clamp(into / decay_steps, max=1) if decay_steps else (into > 0).to(steps.dtype)
        # the root of 0 has an infinite derivative by the power, and a schedule may be differentiated
        fallen = torch.where(part > 0, torch.where(part > 0, part, 1.0) ** power, 0.0)
        return (init_value + (peak_value - init_value) * risen) + (end_value - peak_value) * fallen

    return schedule
