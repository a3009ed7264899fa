"""Updates times a number."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

import functrain.tree as tree
from functrain.optim.numerics.safe import like, scalar, zero_count
from functrain.optim.transformation import (
    EmptyState,
    GradientTransformation,
    Updates,
    identity,
    init_empty_state,
)
from functrain.schedules import Scalar, ScalarOrSchedule, Schedule
from functrain.schedules.schedule import check_number
from functrain.tree import Params

ScaleState = EmptyState


class ScaleByScheduleState(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far


def scale(step_size: Scalar) -> GradientTransformation:
    """Multiply updates by `step_size`.

    >>> tx = ft.optim.scale(-0.1)
    >>> tx.update(torch.tensor([1.0, -2.0]), tx.init(torch.zeros(2)))[0]
    tensor([-0.1000,  0.2000])
    """
    check_number("scale: step_size", step_size)

    def update(updates: Updates, state: EmptyState, params: Params | None = None) -> tuple[Updates, EmptyState]:
        factor = scalar(step_size, updates)
        return tree.map(lambda g: like(factor, g) * g, updates, by_kind=True), state

    return GradientTransformation(init_empty_state, update)


def scale_by_schedule(step_size_fn: Schedule) -> GradientTransformation:
    """Multiply updates by `step_size_fn(number of updates so far)`.

    >>> tx = ft.optim.scale_by_schedule(ft.schedules.linear_schedule(1.0, 0.0, transition_steps=4))
    >>> _, state = tx.update(torch.ones(2), tx.init(torch.zeros(2)))
    >>> tx.update(torch.ones(2), state)[0]
    tensor([0.7500, 0.7500])
    """

    def init(params: Params) -> ScaleByScheduleState:
        return ScaleByScheduleState(zero_count(params))

    def update(
        updates: Updates, state: ScaleByScheduleState, params: Params | None = None
    ) -> tuple[Updates, ScaleByScheduleState]:
        factor = scalar(step_size_fn(state.count), updates)
        return tree.map(lambda g: like(factor, g) * g, updates, by_kind=True), ScaleByScheduleState(state.count + 1)

    return GradientTransformation(init, update)


def scale_by_learning_rate(
    learning_rate: ScalarOrSchedule | None = None, *, flip_sign: bool = True
) -> GradientTransformation:
    """Multiply updates by minus the learning rate, a number or a schedule; None leaves them as they are.

    `flip_sign=False` multiplies by the learning rate itself.

    >>> optimizer = ft.optim.chain(ft.optim.scale_by_adam(), ft.optim.scale_by_learning_rate(0.1))  # is adam(0.1)
    >>> optimizer.update(torch.tensor([3.0, -0.5]), optimizer.init(torch.zeros(2)))[0]
    tensor([-0.1000,  0.1000])
    """
    if learning_rate is None:
        return identity()
    sign = -1 if flip_sign else 1
    if callable(learning_rate):
        return scale_by_schedule(lambda count: sign * learning_rate(count))
    return scale(sign * check_number("scale_by_learning_rate", learning_rate))
