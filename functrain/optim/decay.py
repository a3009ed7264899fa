"""Params pulled towards zero."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

import functrain.tree as tree
from functrain.optim.masking import MaskOrFn, masked
from functrain.optim.numerics.safe import add_scaled, scalar, zero_count
from functrain.optim.transformation import EmptyState, GradientTransformation, OptState, Updates, check_params
from functrain.schedules import ScalarOrSchedule
from functrain.schedules.schedule import check_number
from functrain.tree import Params

AddDecayedWeightsState = EmptyState


class WeightDecaySchedule(NamedTuple):
    """The state of `add_decayed_weights` with a schedule."""

    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far


def add_decayed_weights(weight_decay: ScalarOrSchedule = 0.0, mask: MaskOrFn = None) -> GradientTransformation:
    """Add weight_decay * params to updates, where the mask is True if there is one.

    Raises: ValueError without params, or naming the paths in which params and updates differ.

    >>> params = {"w": torch.tensor([10.0]), "b": torch.tensor([10.0])}
    >>> tx = ft.optim.add_decayed_weights(0.01, mask={"w": True, "b": False})
    >>> tx.update(ft.tree.zeros_like(params), tx.init(params), params)[0]
    {'w': tensor([0.1000]), 'b': tensor([0.])}
    """
    if not callable(weight_decay):
        check_number("add_decayed_weights: weight_decay", weight_decay)

    def init(params: Params) -> OptState:
        return WeightDecaySchedule(zero_count(params)) if callable(weight_decay) else EmptyState()

    def update(updates: Updates, state: OptState, params: Params | None = None) -> tuple[Updates, OptState]:
        check_params(params, "add_decayed_weights")
        rate = weight_decay(state.count) if callable(weight_decay) else weight_decay
        new_state = WeightDecaySchedule(state.count + 1) if callable(weight_decay) else state
        if isinstance(rate, (int, float)) and rate == 0.0:
            return updates, new_state
        factor = scalar(rate, updates)
        return tree.map(lambda g, p: add_scaled(g, factor, p), updates, params, by_kind=True), new_state

    decay = GradientTransformation(init, update)
    return decay if mask is None else masked(decay, mask)
