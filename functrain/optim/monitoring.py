"""Numbers about updates, kept in the state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.averaging import ema
from functrain.optim.combining import chain
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    OptState,
    Updates,
    stateless,
    with_extra_args_support,
)
from functrain.schedules import Scalar
from functrain.tree import Params, Tree


class SnapshotState(NamedTuple):
    measurement: dict[str, Tree]  # the name, and what was measured last


class MonitorState(NamedTuple):
    measurements: dict[str, Tree]  # for each name, what was measured last; zeros before
    measure_states: tuple[OptState, ...]


def snapshot(measure_name: str, measure: Callable[[Updates], Tree]) -> GradientTransformation:
    """Leave updates alone and keep `measure(updates)` in the state; the first one measures the params.

    >>> optimizer = ft.optim.chain(ft.optim.snapshot("grad_norm", ft.optim.global_norm), ft.optim.sgd(0.1))
    >>> _, state = optimizer.update(torch.tensor([3.0, 4.0]), optimizer.init(torch.zeros(2)))
    >>> ft.tree.get(state, "measurement")
    {'grad_norm': tensor(5.)}
    """

    def keep(updates: Updates) -> SnapshotState:
        return SnapshotState({measure_name: _copy(measure(updates))})

    def update(updates: Updates, state: SnapshotState, params: Params | None = None) -> tuple[Updates, SnapshotState]:
        return updates, keep(updates)

    return GradientTransformation(keep, update)


def monitor(
    measures: Mapping[str, GradientTransformation | Callable[[Updates], Tree]],
) -> GradientTransformationExtraArgs:
    """Leave updates alone and keep several measurements of them in the state, by name.

    A measure is a function of updates, or a transformation whose updates are the measurement. optax starts with no
    measurements; here they start at 0, so that the state of a step keeps its structure.

    >>> measures = {"norm": ft.optim.global_norm, "largest": torch.max}
    >>> optimizer = ft.optim.chain(ft.optim.monitor(measures), ft.optim.sgd(0.1))
    >>> _, state = optimizer.update(torch.tensor([3.0, 4.0]), optimizer.init(torch.zeros(2)))
    >>> ft.tree.get(state, "measurements")
    {'norm': tensor(5.), 'largest': tensor(4.)}
    """
    every = {name: with_extra_args_support(_as_transformation(measure)) for name, measure in measures.items()}

    def measure_all(
        updates: Updates, states: tuple[OptState, ...], params: Params | None, **extra_args: Any
    ) -> MonitorState:
        pairs = [
            tx.update(updates, state, params, **extra_args) for tx, state in zip(every.values(), states, strict=True)
        ]
        return MonitorState(
            {name: _copy(value) for name, (value, _) in zip(every, pairs, strict=True)}, tuple([s for _, s in pairs])
        )

    def init(params: Params) -> MonitorState:
        states = tuple([tx.init(params) for tx in every.values()])
        shapes = measure_all(tree.zeros_like(params), states, params).measurements
        return MonitorState(tree.zeros_like(shapes), states)

    def update(
        updates: Updates, state: MonitorState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, MonitorState]:
        return updates, measure_all(updates, state.measure_states, params, **extra_args)

    return GradientTransformationExtraArgs(init, update)


def measure_with_ema(
    measure: Callable[[Updates], Tree],
    decay: Scalar,
    debias: bool = True,
    accumulator_dtype: torch.dtype | None = None,
) -> GradientTransformationExtraArgs:
    """Make a measure for `monitor` that averages `measure(updates)` over time.

    >>> tx = ft.optim.monitor({"mean": ft.optim.measure_with_ema(torch.mean, decay=0.5, debias=False)})
    >>> _, state = tx.update(torch.tensor([1.0, 2.0]), tx.init(torch.zeros(2)))
    >>> state.measurements
    {'mean': tensor(0.7500)}
    """
    average = ema(decay, debias, accumulator_dtype)
    return chain(
        stateless(lambda updates, _: measure(updates)),
        average._replace(init=lambda params: average.init(measure(params))),
    )


def _as_transformation(measure: Any) -> GradientTransformation:
    if isinstance(measure, GradientTransformation):
        return measure
    return stateless(lambda updates, _: measure(updates))


def _copy(measurement: Tree) -> Tree:
    # a measure may return updates or params themselves, whose memory is the caller's
    return tree.map(lambda x: x.clone() if isinstance(x, Tensor) else torch.as_tensor(x), measurement)
