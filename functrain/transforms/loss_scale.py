"""Loss scaling: a loss multiplied before it is differentiated, so that small gradients survive in float16.

A scale is a pair of pure functions and its state a tree of tensors, as an optimizer is: `ft.train_step(...,
loss_scale=dynamic())` and `ft.init_state(..., loss_scale=dynamic())` do all of this by themselves.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain import tree
from functrain.tree import Tree, elsewhere

__all__ = ["DynamicState", "LossScale", "StaticState", "dynamic", "static"]


class LossScale(NamedTuple):
    """A pair of pure functions: `init(device) -> state`, and `update(state, finite) -> state` after a step."""

    init: Callable[..., Any]
    update: Callable[[Any, Tensor], Any]


class DynamicState(NamedTuple):
    scale: Tensor  # (), float32: what the loss is multiplied by
    growth_count: Tensor  # (), int64: finite steps in a row since the scale last changed


class StaticState(NamedTuple):
    scale: Tensor  # (), float32: what the loss is multiplied by


def dynamic(
    init_scale: float = 2.0**16,
    *,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    growth_interval: int = 2000,
) -> LossScale:
    """Multiply the scale by `backoff_factor` after a step that was not finite, and by `growth_factor` after
    `growth_interval` finite ones in a row, unless that makes it infinite.

    Equals `torch.amp.GradScaler` with the same arguments, scale for scale.
    Raises: ValueError for a scale or factor that cannot work.

    >>> scale = ft.loss_scale.dynamic(1024.0)
    >>> state = scale.init()
    >>> scale.update(state, finite=torch.tensor(False)).scale
    tensor(512.)
    """
    _check_scale("dynamic", init_scale)
    if not 1.0 < growth_factor < float("inf"):
        raise ValueError(f"loss_scale.dynamic: expected a finite growth_factor above 1, came {growth_factor}")
    if not 0.0 < backoff_factor < 1.0:
        raise ValueError(f"loss_scale.dynamic: expected backoff_factor in (0, 1), came {backoff_factor}")
    if type(growth_interval) is not int or growth_interval < 1:  # a count never equals 2.5
        raise ValueError(f"loss_scale.dynamic: expected growth_interval of at least 1 step, came {growth_interval!r}")

    def init(device: torch.device | str | None = None) -> DynamicState:
        scale = torch.tensor(init_scale, dtype=torch.float32, device=device)
        return DynamicState(scale, torch.zeros((), dtype=torch.int64, device=device))

    def update(state: DynamicState, finite: Tensor) -> DynamicState:
        count = torch.where(finite, state.growth_count + 1, 0)
        grows = count == growth_interval
        grown = state.scale * growth_factor
        grown = torch.where(torch.isfinite(grown), grown, state.scale)
        scale = torch.where(grows, grown, torch.where(finite, state.scale, state.scale * backoff_factor))
        return DynamicState(scale, torch.where(grows, 0, count))

    return LossScale(init, update)


def static(scale: float) -> LossScale:
    """Keep the scale; a step that is not finite is skipped all the same.

    Raises: ValueError for a scale that is not positive and finite in float32.

    >>> ft.loss_scale.static(1024.0).init()
    StaticState(scale=tensor(1024.))
    """
    _check_scale("static", scale)

    def init(device: torch.device | str | None = None) -> StaticState:
        return StaticState(torch.tensor(scale, dtype=torch.float32, device=device))

    def update(state: StaticState, finite: Tensor) -> StaticState:
        return state

    return LossScale(init, update)


def unscale(grads: Tree, scale: Tensor) -> Tree:
    """Divide gradients by the scale that their loss was multiplied by; half-precision ones become float32.

    Shapes: scale is ().

    >>> ft.loss_scale.unscale({"w": torch.tensor(4.0, dtype=torch.float16)}, torch.tensor(8.0))
    {'w': tensor(0.5000)}
    """
    return tree.map(lambda grad: wide(grad) * (1 / scale).to(wide(grad).dtype), grads)


def wide(leaf: Tensor) -> Tensor:
    """Return a half-precision tensor as float32, where a small number divided by a large scale is still a number.

    >>> ft.loss_scale.wide(torch.ones(1, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return leaf.to(wide_dtype(leaf.dtype))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for half precision, else the dtype itself.

    >>> ft.loss_scale.wide_dtype(torch.float16), ft.loss_scale.wide_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _check_scale(name: str, scale: float) -> None:
    number = torch.finfo(torch.float32)
    if not isinstance(scale, numbers.Real) or not number.tiny <= scale <= number.max:
        raise ValueError(f"loss_scale.{name}: expected a positive finite scale in float32, came {scale!r}")


elsewhere.furnish(__name__)
