"""Normalizations as their formulas, for where transforms differentiate twice.

In torch 2.13 the mean and the deviation that its own have saved are constants to whoever differentiates a backward pass
that is mapped over, or a forward-mode pass: `torch.func.hessian`, and gradients of a map of gradients, are wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Equals `torch.nn.functional.layer_norm`."""
    return _normalized(input, range(-len(normalized_shape), 0), weight, bias, eps)


def _normalized(x: Tensor, dims: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centered = wide - torch.mean(wide, list(dims), keepdim=True)
    y = centered * torch.rsqrt(torch.mean(centered * centered, list(dims), keepdim=True) + eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)
