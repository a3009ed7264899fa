"""What line searches share: the numbers along a line, and the value and gradient that they leave in their state."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.numerics.looping import when
from functrain.optim.transformation import OptState, Updates
from functrain.transforms import value_and_grad
from functrain.tree import Params

ValueFn = Callable[..., Tensor]


def value_and_grad_from_state(value_fn: ValueFn) -> Callable[..., tuple[Tensor, Updates]]:
    """Make a function `(params, *args, state=..., **kwargs)` that returns the value and gradient of `value_fn`.

    A line search has computed both at the new params: they are taken from `state` when its value is finite, and
    computed otherwise, as at the first step. Only for a loss that is the same at every step. Equals
    `optax.value_and_grad_from_state`.

    Raises: ValueError when the state has no value or no gradient.

    >>> value_and_grad = ft.optim.value_and_grad_from_state(lambda params: torch.sum(params**2))
    >>> params, optimizer = torch.tensor([1.0, -2.0]), ft.optim.lbfgs()
    >>> value_and_grad(params, state=optimizer.init(params))
    (tensor(5.), tensor([ 2., -4.]))
    """

    def value_and_grad_of(params: Params, *args: Any, state: OptState, **kwargs: Any) -> tuple[Tensor, Updates]:
        value, grad = tree.get(state, "value"), tree.get(state, "grad")
        if value is None or grad is None:
            raise ValueError(
                "value_and_grad_from_state: expected a value and a gradient in the state, came one without; use "
                "scale_by_zoom_linesearch, or scale_by_backtracking_linesearch(..., store_grad=True)"
            )

        def compute(kept: tuple[Tensor, Updates]) -> tuple[Tensor, Updates]:
            new_value, new_grad = value_and_grad(value_fn)(params, *args, **kwargs)
            return new_value.to(kept[0].dtype), new_grad

        return when(~torch.isfinite(value), compute, (value, grad))

    return value_and_grad_of


def bind(value_fn: ValueFn, given: dict[str, Any], name: str) -> ValueFn:
    """Return `value_fn` with the keyword arguments of the update that it takes.

    Raises: TypeError naming those that it does not take.
    """
    taken = inspect.signature(value_fn).parameters
    lost = sorted(set(given) - set(taken))
    if lost:
        raise TypeError(f"{name}: value_fn takes {list(taken)}, came {lost} besides; pass it only what it takes")
    return lambda params: value_fn(params, **given)


def check_given(name: str, **given: Any) -> None:
    """Raise a ValueError when a search was not given what it reads."""
    lost = [key for key, value in given.items() if value is None]
    if lost:
        raise ValueError(
            f"{name} needs {', '.join(lost)}: call update(grad, state, params, value=value, grad=grad, value_fn=fn)"
        )


def slope_along(updates: Updates, grad: Updates) -> Tensor:
    """Return the derivative along a direction of the function with this gradient; torch's of complex params."""
    return tree.vdot(grad, updates).real


def violation(error: Tensor) -> Tensor:
    """Return how far a criterion is missed: max(error, 0), infinite for NaN."""
    return torch.where(torch.isnan(error), torch.inf, torch.clamp(error, min=0.0))
