"""Schedules of optax, with its names and arguments: decays, warm-ups, and one after another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrain.schedules.schedule import Count, Scalar, Schedule, check_number, steps_of, tensor_like


def constant_schedule(value: Scalar) -> Schedule:
    """Hold one value.

    >>> schedule = ft.schedules.constant_schedule(0.1)
    >>> schedule(1000)
    tensor(0.1000, dtype=torch.float64)
    """
    check_number("constant_schedule", value)
    return lambda count: tensor_like(value, steps_of(count))


def polynomial_schedule(
    init_value: Scalar, end_value: Scalar, power: Scalar, transition_steps: int, transition_begin: int = 0
) -> Schedule:
    """Move from `init_value` to `end_value` along `(1 - t / transition_steps) ** power`.

    Equals `init_value` until `transition_begin` and `end_value` from `transition_begin + transition_steps` on; with no
    steps to move in (`transition_steps <= 0`) it stays at `init_value`.

    >>> schedule = ft.schedules.polynomial_schedule(1.0, 0.0, power=2, transition_steps=10)
    >>> schedule(torch.tensor([0, 5, 10, 20]))
    tensor([1.0000, 0.2500, 0.0000, 0.0000], dtype=torch.float64)
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
    """Move from `init_value` to `end_value` in a straight line. Equals `polynomial_schedule` of power 1.

    >>> schedule = ft.schedules.linear_schedule(1.0, 0.0, transition_steps=10)
    >>> schedule(torch.tensor([0, 5, 10, 20]))
    tensor([1.0000, 0.5000, 0.0000, 0.0000], dtype=torch.float64)
    """
    return polynomial_schedule(init_value, end_value, 1, transition_steps, transition_begin)


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

    >>> schedule = ft.schedules.exponential_decay(1.0, transition_steps=10, decay_rate=0.5)
    >>> schedule(torch.tensor([0, 10, 20]))
    tensor([1.0000, 0.5000, 0.2500], dtype=torch.float64)
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

    >>> schedule = ft.schedules.cosine_decay_schedule(1.0, decay_steps=10, alpha=0.1)
    >>> schedule(torch.tensor([0, 5, 10, 20]))
    tensor([1.0000, 0.5500, 0.1000, 0.1000], dtype=torch.float64)
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

    >>> warmup, rest = ft.schedules.linear_schedule(0.0, 1.0, 10), ft.schedules.constant_schedule(0.5)
    >>> schedule = ft.schedules.join_schedules([warmup, rest], boundaries=[10])
    >>> schedule(torch.tensor([0, 5, 10, 20]))
    tensor([0.0000, 0.5000, 0.5000, 0.5000], dtype=torch.float64)
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
    """Rise in a straight line to `peak_value` and stay there.

    >>> schedule = ft.schedules.warmup_constant_schedule(0.0, 1.0, warmup_steps=10)
    >>> schedule(torch.tensor([0, 5, 10, 20]))
    tensor([0.0000, 0.5000, 1.0000, 1.0000], dtype=torch.float64)
    """
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

    >>> schedule = ft.schedules.warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps=10, decay_steps=110)
    >>> schedule(torch.tensor([0, 5, 10, 60, 110]))
    tensor([0.0000, 0.5000, 1.0000, 0.5000, 0.0000], dtype=torch.float64)
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
    """Rise in a straight line to `peak_value`, then decay as `exponential_decay` does.

    >>> schedule = ft.schedules.warmup_exponential_decay_schedule(0.0, 1.0, 10, transition_steps=10, decay_rate=0.5)
    >>> schedule(torch.tensor([0, 5, 10, 20, 30]))
    tensor([0.0000, 0.5000, 1.0000, 0.5000, 0.2500], dtype=torch.float64)
    """
    warmup = linear_schedule(init_value, peak_value, warmup_steps)
    decay = exponential_decay(peak_value, transition_steps, decay_rate, transition_begin, staircase, end_value)
    return join_schedules([warmup, decay], [warmup_steps])


def sgdr_schedule(cosine_kwargs: Iterable[dict[str, Any]]) -> Schedule:
    """Run one `warmup_cosine_decay_schedule(**kwargs)` after another: warm restarts.

    Source: Loshchilov and Hutter 2017 (arXiv:1608.03983).

    >>> cycle = {"init_value": 0.0, "peak_value": 1.0, "warmup_steps": 2, "decay_steps": 10}
    >>> schedule = ft.schedules.sgdr_schedule([cycle, cycle | {"peak_value": 0.5}])
    >>> schedule(torch.tensor([0, 2, 6, 10, 12, 16]))
    tensor([0.0000, 1.0000, 0.5000, 0.0000, 0.5000, 0.2500], dtype=torch.float64)
    """
    cycles = list(cosine_kwargs)
    ends = [sum(kwargs["decay_steps"] for kwargs in cycles[: i + 1]) for i in range(len(cycles))]
    return join_schedules([warmup_cosine_decay_schedule(**kwargs) for kwargs in cycles], ends[:-1])


def _ratio(numerator: Scalar, denominator: Scalar) -> Scalar:
    """Return numerator / denominator, and 0 where the denominator is 0, without a gradient of NaN there."""
    if not isinstance(denominator, Tensor):
        return 0.0 if denominator == 0.0 else numerator / denominator
    empty = denominator == 0
    return torch.where(empty, 0.0, numerator / torch.where(empty, 1.0, denominator))
