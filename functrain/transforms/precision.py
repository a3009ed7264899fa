"""Mixed precision by casting the tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from functrain import tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Which floating-point dtype a function computes in and returns.

    Source: the three dtypes of DeepMind's jmp; the parameters keep their own.
    """

    compute: torch.dtype
    output: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name, dtype in (("compute", self.compute), ("output", self.output)):
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
                raise TypeError(f"Policy: {name}: expected a floating-point torch.dtype, came {dtype!r}")


def mixed_precision(fn: Callable[..., Any], policy: Policy) -> Callable[..., Any]:
    """Make a function that casts floating-point arguments to the compute dtype and results to the output dtype.

    Gradients reach the arguments in the arguments' own dtypes, because a cast is differentiable: parameters kept in
    float32 are float32 master copies.

    Raises: TypeError when `policy` is no Policy.
    """
    if not isinstance(policy, Policy):
        raise TypeError(f"mixed_precision: expected a Policy, came {policy!r}; for one dtype, Policy(compute=dtype)")

    @wraps(fn)
    def in_precision(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = (tree.cast(value, policy.compute) for value in (args, kwargs))
        return tree.map(lambda x: _to(x, policy.output), fn(*args, **kwargs))

    return in_precision


def _to(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
