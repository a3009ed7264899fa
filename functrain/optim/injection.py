"""Hyper-parameters kept in the state, where they can be read and changed."""

from __future__ import annotations

import functools
import inspect
import numbers
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.numerics.safe import (
    device_of,
    zero_count,
)
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    OptState,
    Updates,
    check_kind,
    with_extra_args_support,
)
from functrain.schedules import Scalar, Schedule
from functrain.tree import Params, Tree


@runtime_checkable
class StatefulSchedule(Protocol):
    """A schedule with a state of its own."""

    def init(self) -> Tree:
        """Return the first state."""
        ...

    def update(self, state: Tree, **extra_args: Any) -> Tree:
        """Return the next state."""
        ...

    def __call__(self, state: Tree, **extra_args: Any) -> Scalar:
        """Return the value."""
        ...


class WrappedScheduleState(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far


class WrappedSchedule:
    """A function of the count as a schedule with a state."""

    def __init__(self, schedule_fn: Schedule) -> None:
        self.schedule_fn = schedule_fn

    def init(self) -> WrappedScheduleState:
        """Return a count of zero."""
        return WrappedScheduleState(torch.zeros((), dtype=torch.int64))

    def update(self, state: WrappedScheduleState, **extra_args: Any) -> WrappedScheduleState:
        """Count one more."""
        return WrappedScheduleState(state.count + 1)

    def __call__(self, state: WrappedScheduleState, **extra_args: Any) -> Scalar:
        """Return the value at the count."""
        return self.schedule_fn(state.count)


class InjectHyperparamsState(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far
    hyperparams: dict[str, Tensor]
    inner_state: OptState


class InjectStatefulHyperparamsState(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far
    hyperparams: dict[str, Tensor]  # by argument name: numbers, and what schedules gave last
    hyperparams_states: dict[str, Tree]  # by argument name: the states of schedules
    inner_state: OptState


def inject_hyperparams(
    inner_factory: Callable[..., GradientTransformation],
    static_args: str | Iterable[str] = (),
    hyperparam_dtype: torch.dtype | None = None,
) -> Callable[..., GradientTransformationExtraArgs]:
    """Return `inner_factory` made so that the numbers it is given live in the state, where they can be changed.

    Equals `inner_factory`, any number replaced by a schedule if wanted, as long as nobody changes the state. Arguments
    named in `static_args`, and bool ones, stay what they are. Numbers are kept in `hyperparam_dtype`, without it in the
    widest floating-point dtype of the params, at least float32.

    Raises: ValueError for a static argument that `inner_factory` does not have; from init, TypeError for a function
    that is no schedule, such as a mask.

    >>> optimizer, params = ft.optim.inject_hyperparams(ft.optim.adam)(learning_rate=0.1), torch.zeros(1)
    >>> state = optimizer.init(params)
    >>> state.hyperparams["learning_rate"] = torch.tensor(0.01)
    >>> optimizer.update(torch.ones(1), state, params)[0]
    tensor([-0.0100])
    """
    static = {static_args} if isinstance(static_args, str) else set(static_args)
    signature = inspect.signature(inner_factory)
    if not static <= set(signature.parameters):
        raise ValueError(
            f"inject_hyperparams: {sorted(static - set(signature.parameters))} are no arguments of the factory; "
            f"there is {list(signature.parameters)}"
        )

    @functools.wraps(inner_factory)
    def factory(*args: Any, **kwargs: Any) -> GradientTransformationExtraArgs:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        schedules, fixed, others = _sort(bound.arguments, static)

        def build(hyperparams: dict[str, Tensor]) -> GradientTransformationExtraArgs:
            return with_extra_args_support(inner_factory(**others, **hyperparams))

        def init(params: Params) -> InjectStatefulHyperparamsState:
            dtype, device = hyperparam_dtype or _widest(params), device_of(params)
            states = {name: tree.to(schedule.init(), device) for name, schedule in schedules.items()}
            values = fixed | {name: value for name, value in _replaced.items() if name in fixed}
            values |= {name: _first(name, schedule, states[name]) for name, schedule in schedules.items()}
            hyperparams = {name: _tensor(value, dtype, device) for name, value in values.items()}
            return InjectStatefulHyperparamsState(
                zero_count(params), hyperparams, states, build(hyperparams).init(params)
            )

        def update(
            updates: Updates, state: InjectStatefulHyperparamsState, params: Params | None = None, **extra_args: Any
        ) -> tuple[Updates, InjectStatefulHyperparamsState]:
            check_kind("inject_hyperparams", state, InjectStatefulHyperparamsState)
            hyperparams = dict(state.hyperparams)
            for name, schedule in schedules.items():
                old = hyperparams[name]
                value = schedule(state.hyperparams_states[name], **extra_args)
                hyperparams[name] = torch.as_tensor(value, dtype=old.dtype, device=old.device)
            states = {
                name: schedule.update(state.hyperparams_states[name], **extra_args)
                for name, schedule in schedules.items()
            }
            updates, inner_state = build(hyperparams).update(updates, state.inner_state, params, **extra_args)
            return updates, InjectStatefulHyperparamsState(state.count + 1, hyperparams, states, inner_state)

        return GradientTransformationExtraArgs(init, update)

    return factory


_replaced: dict[str, Tensor] = {}


@contextmanager
def replaced(hyperparams: dict[str, Tensor]) -> Iterator[None]:
    """Inside, let `init` of what `inject_hyperparams` made start from these numbers, where it has them by name."""
    _replaced.update(hyperparams)
    try:
        yield
    finally:
        _replaced.clear()


def inject_stateful_hyperparams(
    inner_factory: Callable[..., GradientTransformation],
    static_args: str | Iterable[str] = (),
    hyperparam_dtype: torch.dtype | None = None,
) -> Callable[..., GradientTransformationExtraArgs]:
    """Equals `inject_hyperparams`; deprecated in optax for it.

    >>> import warnings
    >>> with warnings.catch_warnings(action="ignore"):
    ...     optimizer = ft.optim.inject_stateful_hyperparams(ft.optim.sgd)(learning_rate=0.1)
    >>> optimizer.init(torch.zeros(1)).hyperparams["learning_rate"]
    tensor(0.1000)
    """
    warnings.warn("inject_stateful_hyperparams is deprecated, use inject_hyperparams", DeprecationWarning, stacklevel=2)
    return inject_hyperparams(inner_factory, static_args, hyperparam_dtype)


def _sort(
    arguments: dict[str, Any], static: set[str]
) -> tuple[dict[str, StatefulSchedule], dict[str, Any], dict[str, Any]]:
    """Return the arguments that are schedules, those that are numbers, and the others."""
    schedules: dict[str, StatefulSchedule] = {}
    values: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in static or isinstance(value, bool):
            others[name] = value
        elif isinstance(value, StatefulSchedule):
            schedules[name] = value
        elif callable(value):
            schedules[name] = WrappedSchedule(value)
        elif isinstance(value, (numbers.Real, Tensor)):
            values[name] = value
        else:
            others[name] = value
    return schedules, values, others


def _first(name: str, schedule: StatefulSchedule, state: Tree) -> Scalar:
    """Return the first value of a schedule; what a mask makes of a count is none."""
    try:
        value = schedule(state)
    except Exception as error:
        raise _no_schedule(name, f"one that raises {type(error).__name__} there") from error
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, Tensor)) or getattr(value, "shape", ()) != ():
        came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise _no_schedule(name, f"one that returns {came}")
    return value


def _no_schedule(name: str, came: str) -> TypeError:
    return TypeError(
        f"inject_hyperparams: {name}: expected a number or a schedule, a function from the count to a number, came "
        f"{came}; for another function, such as a mask, name it in static_args={name!r}"
    )


def _tensor(value: Scalar, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(dtype if value.is_floating_point() else value.dtype, copy=True).to(device)
    return torch.full((), value, dtype=torch.int64 if isinstance(value, int) else dtype, device=device)


def _widest(params: Params) -> torch.dtype:
    inexact = [leaf for leaf in tree.leaves(params) if leaf.is_floating_point() or leaf.is_complex()]
    dtypes = [leaf.dtype.to_real() if leaf.is_complex() else leaf.dtype for leaf in inexact]
    # a decay of 0.999 is 1 in bfloat16, by which Adam would divide zero
    return functools.reduce(torch.promote_types, dtypes, torch.float32)
