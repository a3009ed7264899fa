"""Normalizations as their formulas, for where transforms differentiate twice.

In torch 2.13 the mean and the deviation that its own have saved are constants to whoever differentiates a backward pass
that is mapped over, or a forward-mode pass: `torch.func.hessian`, and gradients of a map of gradients, are wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Formulas(TorchFunctionMode):
    """Inside, torch's normalizations are their formulas."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _FORMULAS.get(func, func)(*args, **(kwargs or {}))


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Equals `torch.nn.functional.layer_norm`."""
    return _normalized(input, range(-len(normalized_shape), 0), weight, bias, eps)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Equals `torch.nn.functional.batch_norm`, also in what it writes into the running statistics."""
    given = (input, running_mean, running_var, weight, bias, training, momentum, eps)
    written = F.batch_norm(*given)
    if not training:
        return written
    return _normalized(input, [0, *range(2, input.dim())], _of_channels(weight, input), _of_channels(bias, input), eps)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Equals `torch.nn.functional.instance_norm`, also in what it writes into the running statistics."""
    given: Any = (input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    written = F.instance_norm(*given)
    if not use_input_stats:
        return written
    return _normalized(input, range(2, input.dim()), _of_channels(weight, input), _of_channels(bias, input), eps)


def _normalized(x: Tensor, dims: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centered = wide - torch.mean(wide, list(dims), keepdim=True)
    y = centered * torch.rsqrt(torch.mean(centered * centered, list(dims), keepdim=True) + eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


def _of_channels(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.view(-1, *[1] * (x.dim() - 2))


_FORMULAS: dict[Any, Any] = {F.layer_norm: layer_norm, F.batch_norm: batch_norm, F.instance_norm: instance_norm}
