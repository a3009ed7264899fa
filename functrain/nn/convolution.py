"""Convolutions over one, two or three dims of space, as many as the weight has. Weights lie as torch's do.

B batch, I input channels, O output channels, *S dims of space, *K the kernel's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

Sizes = int | Sequence[int]  # of each dim of space, or one for all


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Tensor:
    """Return the convolution of x (B, I, *S) with weight (O, I / groups, *K), plus bias (O,): (B, O, *S').

    `padding="same"` keeps the sizes of space at a stride of 1. Equals `torch.nn.functional.conv1d`, `conv2d`, `conv3d`.

    Raises: ValueError for an x without the dims of the weight.

    >>> ft.nn.conv(torch.tensor([[[0.0, 1.0, 3.0, 6.0]]]), torch.tensor([[[-1.0, 1.0]]]))  # differences of neighbours
    tensor([[[1., 2., 3.]]])
    >>> images, weight = torch.ones(2, 3, 32, 32), torch.ones(16, 3, 3, 3)
    >>> ft.nn.conv(images, weight, stride=2, padding=1).shape
    torch.Size([2, 16, 16, 16])
    """
    of = _of_dims("conv", x, weight, {3: F.conv1d, 4: F.conv2d, 5: F.conv3d})
    return of(x, weight, bias, stride, padding, dilation, groups)


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
) -> Tensor:
    """Return the transposed convolution of x (B, I, *S) with weight (I, O / groups, *K), plus bias (O,): (B, O, *S').

    It is the gradient of `conv` with this weight by its input, and makes images larger. Equals
    `torch.nn.functional.conv_transpose1d`, `conv_transpose2d`, `conv_transpose3d`.

    Raises: ValueError for an x without the dims of the weight.

    >>> ft.nn.conv_transpose(torch.tensor([[[1.0, 2.0]]]), torch.ones(1, 1, 2), stride=2)
    tensor([[[1., 1., 2., 2.]]])
    """
    by_dims = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}
    of = _of_dims("conv_transpose", x, weight, by_dims)
    return of(x, weight, bias, stride, padding, output_padding, groups, dilation)


def _of_dims(what: str, x: Tensor, weight: Tensor, by_dims: dict[int, Callable[..., Any]]) -> Callable[..., Any]:
    if weight.dim() not in by_dims or x.dim() != weight.dim():
        raise ValueError(
            f"{what}: expected x (B, I, *S) and a weight of as many dims, three to five, came {tuple(x.shape)} and "
            f"{tuple(weight.shape)}; write x[None] for a single example, or x[:, None] for one channel"
        )
    return by_dims[weight.dim()]
