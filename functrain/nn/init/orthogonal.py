"""Weights that keep lengths: orthogonal matrices, drawn uniformly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functrain import random
from functrain.nn.init.scaling import Initializer


def orthogonal(scale: float = 1.0, column_dim: int = -1) -> Initializer:
    """Make an initializer of `scale` times a uniformly distributed matrix with orthonormal columns, or rows if fewer.

    The columns are along `column_dim`, the rows along all other dims together.

    Equals `jax.nn.initializers.orthogonal`, to the rounding of a QR decomposition. Source: Saxe et al. 2013
    (arXiv:1312.6120).

    Raises: at the call, ValueError for a shape of less than two dims.

    >>> weight = ft.nn.init.orthogonal()(ft.random.key(0), (4, 3))
    >>> torch.allclose(weight.T @ weight, torch.eye(3), atol=1e-5)
    True
    """

    def init(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        if len(shape) < 2:
            raise ValueError(f"orthogonal: expected a shape of two dims or more, came {tuple(shape)}; use normal")
        if 0 in shape:
            return torch.zeros(tuple(shape), dtype=dtype, device=key.device)
        columns = shape[column_dim]
        rows = math.prod(shape) // columns
        wide = torch.promote_types(dtype, torch.float32)
        q, r = torch.linalg.qr(random.normal(key, (max(rows, columns), min(rows, columns)), wide))
        q = q * torch.sign(torch.diagonal(r))  # with the signs that QR chose, it would not be uniform
        matrix = q.mT if rows < columns else q  # (rows, columns)
        others = list(shape)
        del others[column_dim]
        return (scale * torch.movedim(matrix.reshape(*others, columns), -1, column_dim)).to(dtype).contiguous()

    return init


def delta_orthogonal(scale: float = 1.0) -> Initializer:
    """Make an initializer of a convolution's weight (O, I, *kernel): an orthogonal matrix in the middle, else zeros.

    Equals `jax.nn.initializers.delta_orthogonal`, whose weights are (*kernel, I, O). Source: Xiao et al. 2018
    (arXiv:1806.05393).

    Raises: at the call, ValueError for a shape of other than three to five dims, or with fewer outputs than inputs.

    >>> weight = ft.nn.init.delta_orthogonal()(ft.random.key(0), (4, 3, 3))  # (O, I, K)
    >>> weight.count_nonzero((0, 1))  # zeros but in the middle of the kernel
    tensor([ 0, 12,  0])
    >>> torch.allclose(weight[..., 1].T @ weight[..., 1], torch.eye(3), atol=1e-5)
    True
    """

    def init(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        if not 3 <= len(shape) <= 5:
            raise ValueError(f"delta_orthogonal: expected (O, I, *kernel) of 3 to 5 dims, came {tuple(shape)}")
        outputs, inputs, *kernel = shape
        if outputs < inputs:
            raise ValueError(
                f"delta_orthogonal: expected no fewer outputs than inputs, came (O, I) = {(outputs, inputs)}; use "
                "orthogonal()"
            )
        weight = torch.zeros(tuple(shape), dtype=dtype, device=key.device)
        middle: Any = (..., *[(size - 1) // 2 for size in kernel])
        weight[middle] = orthogonal(scale)(key, (inputs, outputs), dtype).T
        return weight

    return init
