"""What a schedule is: a function of the number of steps done."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

Scalar: TypeAlias = float | Tensor
Count: TypeAlias = int | Tensor
Schedule: TypeAlias = Callable[[Any], Scalar]
ScalarOrSchedule: TypeAlias = Scalar | Schedule


def steps_of(count: Count) -> Tensor:
    return (count if isinstance(count, Tensor) else torch.tensor(count)).to(torch.float64)


def tensor_like(value: Scalar, steps: Tensor) -> Tensor:
    """Return `value` as float64, in the shape and on the device of `steps`."""
    if isinstance(value, Tensor):
        return value.to(torch.float64).expand(torch.broadcast_shapes(value.shape, steps.shape))
    return torch.full_like(steps, check_number("a schedule", value))


def check_number(what: str, value: Any) -> Any:
    """Return a number.

    Raises: TypeError for anything else, such as the text that YAML reads 1e-3 as.
    """
    if isinstance(value, (int, float, Tensor, numbers.Number)):
        return value
    way_out = f"write float({value!r})" if isinstance(value, str) else "pass an int, a float or a () tensor"
    raise TypeError(f"{what}: expected a number, came {type(value).__name__} {value!r}; {way_out}")
