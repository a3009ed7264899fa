"""Schedules of optax through given values at given steps: pieces, and one cycle."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from functrain.schedules.schedule import Count, Scalar, Schedule, steps_of, tensor_like


def piecewise_constant_schedule(init_value: Scalar, boundaries_and_scales: dict[int, float] | None = None) -> Schedule:
    """Multiply the value by `scale` at every boundary `{step: scale}` that has been reached.

    >>> schedule = ft.schedules.piecewise_constant_schedule(1.0, {10: 0.1, 20: 0.5})
    >>> schedule(torch.tensor([9, 10, 20]))
    tensor([1.0000, 0.1000, 0.0500], dtype=torch.float64)
    """
    pieces = _sorted_scales(boundaries_and_scales, "piecewise_constant_schedule")

    def schedule(count: Count) -> Tensor:
        steps = steps_of(count)
        value = tensor_like(init_value, steps)
        for boundary, scale in pieces:
            value = torch.where(steps < boundary, value, scale * value)
        return value

    return schedule


def piecewise_interpolate_schedule(
    interpolate_type: str, init_value: Scalar, boundaries_and_scales: dict[int, float] | None = None
) -> Schedule:
    """Pass through the value reached at each boundary `{step: scale}`, "linear" or "cosine" in between.

    The values at the boundaries are `init_value` times the product of the scales so far.

    >>> schedule = ft.schedules.piecewise_interpolate_schedule("linear", 1.0, {10: 0.5, 20: 0.5})
    >>> schedule(torch.tensor([0, 5, 10, 15, 20]))
    tensor([1.0000, 0.7500, 0.5000, 0.3750, 0.2500], dtype=torch.float64)
    """
    if interpolate_type not in ("linear", "cosine"):
        raise ValueError(f"piecewise_interpolate_schedule: choose 'linear' or 'cosine', came {interpolate_type!r}")
    between = _linear if interpolate_type == "linear" else _cosine
    pieces = _sorted_scales(boundaries_and_scales, "piecewise_interpolate_schedule")

    def schedule(count: Count) -> Tensor:
        steps = steps_of(count)
        start, begin = tensor_like(init_value, steps), 0
        value, rows = start, []
        for boundary, scale in pieces:
            end = start * scale
            rows.append((boundary, between(start, end, (steps - begin) / max(boundary - begin, 1))))
            start, begin = end, boundary
        value = start
        for boundary, within in reversed(rows):
            value = torch.where(steps < boundary, within, value)
        return value

    return schedule


def linear_onecycle_schedule(
    transition_steps: int,
    peak_value: Scalar,
    pct_start: float = 0.3,
    pct_final: float = 0.85,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> Schedule:
    """Rise to `peak_value`, fall back as far, then to `peak_value / (div_factor * final_div_factor)`, in lines.

    Source: Smith and Topin 2017 (arXiv:1708.07120).

    >>> schedule = ft.schedules.linear_onecycle_schedule(100, peak_value=1.0)
    >>> schedule(torch.tensor([0, 30, 85, 100]))
    tensor([4.0000e-02, 1.0000e+00, 4.0000e-02, 4.0000e-06], dtype=torch.float64)
    """
    _check_positive(transition_steps, "linear_onecycle_schedule")
    scales = {
        int(pct_start * transition_steps): div_factor,
        int(pct_final * transition_steps): 1.0 / div_factor,
        transition_steps: 1.0 / final_div_factor,
    }
    return piecewise_interpolate_schedule("linear", peak_value / div_factor, scales)


def cosine_onecycle_schedule(
    transition_steps: int,
    peak_value: Scalar,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> Schedule:
    """Rise to `peak_value`, then fall to `peak_value / (div_factor * final_div_factor)`, each along half a cosine.

    Source: Smith and Topin 2017 (arXiv:1708.07120).

    >>> schedule = ft.schedules.cosine_onecycle_schedule(100, peak_value=1.0)
    >>> schedule(torch.tensor([0, 30, 65, 100]))
    tensor([4.0000e-02, 1.0000e+00, 5.0000e-01, 4.0000e-06], dtype=torch.float64)
    """
    _check_positive(transition_steps, "cosine_onecycle_schedule")
    scales = {
        int(pct_start * transition_steps): div_factor,
        int(transition_steps): 1.0 / (div_factor * final_div_factor),
    }
    return piecewise_interpolate_schedule("cosine", peak_value / div_factor, scales)


def _linear(start: Tensor, end: Tensor, part: Tensor) -> Tensor:
    return (end - start) * part + start


def _cosine(start: Tensor, end: Tensor, part: Tensor) -> Tensor:
    return end + (start - end) / 2.0 * (torch.cos(math.pi * part) + 1)


def _sorted_scales(boundaries_and_scales: dict[int, float] | None, name: str) -> list[tuple[int, float]]:
    pieces = sorted((boundaries_and_scales or {}).items())
    for boundary, scale in pieces:
        if not isinstance(scale, Tensor) and scale < 0.0:
            raise ValueError(f"{name}: the scale at step {boundary} must not be negative, came {scale}")
    return pieces


def _check_positive(transition_steps: int, name: str) -> None:
    if transition_steps <= 0:
        raise ValueError(f"{name}: transition_steps must be positive, came {transition_steps}")
