"""The schedules of optax, with its names and arguments."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrain.schedules.schedule import Count, Scalar, Schedule, check_number, steps_of, tensor_like


def constant_schedule(value: Scalar) -> Schedule:
    """Hold one value."""
    check_number("constant_schedule", value)
    return lambda count: tensor_like(value, steps_of(count))


def polynomial_schedule(
    init_value: Scalar, end_value: Scalar, power: Scalar, transition_steps: int, transition_begin: int = 0
) -> Schedule:
    """Move from `init_value` to `end_value` along `(1 - t / transition_steps) ** power`.

    Equals `init_value` until `transition_begin` and `end_value` from `transition_begin + transition_steps` on; with no
    steps to move in (`transition_steps <= 0`) it stays at `init_value`.
    """
    for value in (init_value, end_value, power):
        check_number("polynomial_schedule", value)
    if transition_steps <= 0:
        return constant_schedule(init_value)

    def schedule(count: Count) -> Tensor:
        steps = torch.clamp(steps_of(count) - max(transition_begin, 0), 0, transition_steps)
        return (init_value - end_value) * (1 - steps / transition_steps) ** power + end_value

    return schedule


def linear_schedule(
    init_value: Scalar, end_value: Scalar, transition_steps: int, transition_begin: int = 0
) -> Schedule:
    """Move from `init_value` to `end_value` in a straight line. Equals `polynomial_schedule` of power 1."""
    return polynomial_schedule(init_value, end_value, 1, transition_steps, transition_begin)


def piecewise_constant_schedule(init_value: Scalar, boundaries_and_scales: dict[int, float] | None = None) -> Schedule:
    """Multiply the value by `scale` at every boundary `{step: scale}` that has been reached."""
    pieces = _sorted_scales(boundaries_and_scales, "piecewise_constant_schedule")

    def schedule(count: Count) -> Tensor:
        steps = steps_of(count)
        value = tensor_like(init_value, steps)
        for boundary, scale in pieces:
            value = torch.where(steps < boundary, value, scale * value)
        return value

    return schedule


def exponential_decay(
    init_value: Scalar,
    transition_steps: int,
    decay_rate: Scalar,
    transition_begin: int = 0,
    staircase: bool = False,
    end_value: Scalar | None = None,
) -> Schedule:
    """Multiply by `decay_rate` every `transition_steps` steps: `init_value * decay_rate ** (t / transition_steps)`.

    Equals `init_value` until `transition_begin`. `staircase` rounds the exponent down. `end_value` bounds the value
    from below when it decays and from above when it grows. No steps, or a rate of zero, means no decay.
    """
    for value in (init_value, decay_rate, 0.0 if end_value is None else end_value):
        check_number("exponential_decay", value)
    if transition_steps <= 0:
        return constant_schedule(init_value)

    def schedule(count: Count) -> Tensor:
        steps = steps_of(count)
        rate = tensor_like(decay_rate, steps)
        exponent = torch.clamp(steps - max(transition_begin, 0), min=0) / transition_steps
        exponent = torch.floor(exponent) if staircase else exponent
        value = init_value * torch.where(rate == 0, 1.0, rate) ** exponent
        if end_value is None:
            return value
        end = tensor_like(end_value, steps)
        bounded = torch.where(rate < 1, torch.maximum(value, end), torch.minimum(value, end))
        return torch.where(rate == 0, value, bounded)

    return schedule


def cosine_decay_schedule(
    init_value: Scalar, decay_steps: int, alpha: Scalar = 0.0, exponent: Scalar = 1.0
) -> Schedule:
    """Follow half a cosine from `init_value` down to `alpha * init_value`, and stay there.

    Source: Loshchilov and Hutter 2017 (arXiv:1608.03983), equation 5.
    """
    for value in (init_value, alpha, exponent):
        check_number("cosine_decay_schedule", value)
    if not decay_steps > 0:
        raise ValueError(f"cosine_decay_schedule: decay_steps must be positive, came {decay_steps}")

    def schedule(count: Count) -> Tensor:
        steps = torch.clamp(steps_of(count), max=decay_steps)
        cosine = 0.5 * (1 + torch.cos(math.pi * steps / decay_steps))
        return init_value * ((1 - alpha) * cosine**exponent + alpha)

    return schedule


def join_schedules(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """Run schedules one after another; each counts from the boundary at which it begins.

    Raises: ValueError unless there is one boundary between each two schedules.
    """
    schedules, boundaries = list(schedules), list(boundaries)
    if len(boundaries) != len(schedules) - 1:
        raise ValueError(
            f"join_schedules: {len(schedules)} schedules need {len(schedules) - 1} boundaries, came {len(boundaries)}"
        )

    def joined(count: Count) -> Tensor:
        steps = steps_of(count)
        value = tensor_like(schedules[0](count), steps)
        for boundary, schedule in zip(boundaries, schedules[1:], strict=True):
            value = torch.where(steps < boundary, value, tensor_like(schedule(count - boundary), steps))
        return value

    return joined


def warmup_constant_schedule(init_value: Scalar, peak_value: Scalar, warmup_steps: int) -> Schedule:
    """Rise in a straight line to `peak_value` and stay there."""
    return linear_schedule(init_value, peak_value, warmup_steps)


def warmup_cosine_decay_schedule(
    init_value: Scalar,
    peak_value: Scalar,
    warmup_steps: int,
    decay_steps: int,
    end_value: Scalar = 0.0,
    exponent: Scalar = 1.0,
) -> Schedule:
    """Rise in a straight line to `peak_value`, then follow half a cosine down to `end_value`.

    `decay_steps` is the length of the whole schedule, warm-up included.
    """
    warmup = linear_schedule(init_value, peak_value, warmup_steps)
    decay = cosine_decay_schedule(peak_value, decay_steps - warmup_steps, _ratio(end_value, peak_value), exponent)
    return join_schedules([warmup, decay], [warmup_steps])


def warmup_exponential_decay_schedule(
    init_value: Scalar,
    peak_value: Scalar,
    warmup_steps: int,
    transition_steps: int,
    decay_rate: Scalar,
    transition_begin: int = 0,
    staircase: bool = False,
    end_value: Scalar | None = None,
) -> Schedule:
    """Rise in a straight line to `peak_value`, then decay as `exponential_decay` does."""
    warmup = linear_schedule(init_value, peak_value, warmup_steps)
    decay = exponential_decay(peak_value, transition_steps, decay_rate, transition_begin, staircase, end_value)
    return join_schedules([warmup, decay], [warmup_steps])


def sgdr_schedule(cosine_kwargs: Iterable[dict[str, Any]]) -> Schedule:
    """Run one `warmup_cosine_decay_schedule(**kwargs)` after another: warm restarts.

    Source: Loshchilov and Hutter 2017 (arXiv:1608.03983).
    """
    cycles = list(cosine_kwargs)
    ends = [sum(kwargs["decay_steps"] for kwargs in cycles[: i + 1]) for i in range(len(cycles))]
    return join_schedules([warmup_cosine_decay_schedule(**kwargs) for kwargs in cycles], ends[:-1])


def piecewise_interpolate_schedule(
    interpolate_type: str, init_value: Scalar, boundaries_and_scales: dict[int, float] | None = None
) -> Schedule:
    """Pass through the value reached at each boundary `{step: scale}`, "linear" or "cosine" in between.

    The values at the boundaries are `init_value` times the product of the scales so far.
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
    """
    _check_positive(transition_steps, "cosine_onecycle_schedule")
    scales = {
        int(pct_start * transition_steps): div_factor,
        int(transition_steps): 1.0 / (div_factor * final_div_factor),
    }
    return piecewise_interpolate_schedule("cosine", peak_value / div_factor, scales)


def _ratio(numerator: Scalar, denominator: Scalar) -> Scalar:
    """Return numerator / denominator, and 0 where the denominator is 0, without a gradient of NaN there."""
    if not isinstance(denominator, Tensor):
        return 0.0 if denominator == 0.0 else numerator / denominator
    empty = denominator == 0
    return torch.where(empty, 0.0, numerator / torch.where(empty, 1.0, denominator))


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
