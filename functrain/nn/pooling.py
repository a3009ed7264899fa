"""Pooling over one, two or three dims of space, as many as x has.

B batch, C channels, *S dims of space.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from functrain.nn.convolution import Sizes


def max_pool(
    x: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    *,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Return the largest numbers of the windows of x (B, C, *S), which are as far apart as they are long.

    Equals `torch.nn.functional.max_pool1d`, `max_pool2d`, `max_pool3d`.

    >>> ft.nn.max_pool(torch.tensor([[[1.0, 3.0, 2.0, 4.0]]]), 2)
    tensor([[[3., 4.]]])
    """
    of = _of_dims("max_pool", x, [F.max_pool1d, F.max_pool2d, F.max_pool3d])
    return of(x, kernel_size, stride, padding, dilation, ceil_mode)


def avg_pool(
    x: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    *,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """Return the means of the windows of x (B, C, *S), which are as far apart as they are long.

    Equals `torch.nn.functional.avg_pool1d`, `avg_pool2d`, `avg_pool3d`.

    >>> ft.nn.avg_pool(torch.tensor([[[1.0, 3.0, 2.0, 4.0]]]), 2)
    tensor([[[2., 3.]]])
    """
    of = _of_dims("avg_pool", x, [F.avg_pool1d, F.avg_pool2d, F.avg_pool3d])
    return of(x, kernel_size, stride, padding, ceil_mode, count_include_pad)


def adaptive_avg_pool(x: Tensor, output_size: Sizes) -> Tensor:
    """Return the means of as many windows of x (B, C, *S) as `output_size` says.

    Equals `torch.nn.functional.adaptive_avg_pool1d`, `adaptive_avg_pool2d`, `adaptive_avg_pool3d`.

    >>> ft.nn.adaptive_avg_pool(torch.tensor([[[1.0, 3.0, 2.0, 4.0]]]), 1)
    tensor([[[2.5000]]])
    >>> ft.nn.adaptive_avg_pool(torch.ones(2, 16, 30, 40), 7).shape  # of images of any size
    torch.Size([2, 16, 7, 7])
    """
    of = _of_dims("adaptive_avg_pool", x, [F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d])
    return of(x, output_size)


def adaptive_max_pool(x: Tensor, output_size: Sizes) -> Tensor:
    """Return the largest numbers of as many windows of x (B, C, *S) as `output_size` says.

    Equals `torch.nn.functional.adaptive_max_pool1d`, `adaptive_max_pool2d`, `adaptive_max_pool3d`.

    >>> ft.nn.adaptive_max_pool(torch.tensor([[[1.0, 3.0, 2.0, 4.0]]]), 2)
    tensor([[[3., 4.]]])
    """
    of = _of_dims("adaptive_max_pool", x, [F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d])
    return of(x, output_size)


def global_avg_pool(x: Tensor) -> Tensor:
    """Return the mean of x (B, C, *S) over space, (B, C): what a classifier reads.

    Equals `adaptive_avg_pool(x, 1)`, flattened.

    >>> ft.nn.global_avg_pool(torch.tensor([[[1.0, 3.0], [10.0, 20.0]]]))
    tensor([[ 2., 15.]])
    """
    _of_dims("global_avg_pool", x, [None, None, None])
    return torch.mean(x, tuple(range(2, x.dim())))


def _of_dims(what: str, x: Tensor, by_dims: list[Any]) -> Callable[..., Any]:
    if not 3 <= x.dim() <= 5:
        raise ValueError(
            f"{what}: expected x (B, C, *S) with one to three dims of space, came {tuple(x.shape)}; write x[None] "
            "for a single example"
        )
    return by_dims[x.dim() - 3]
