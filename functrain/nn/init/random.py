"""Weights of a distribution that does not depend on the shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from functrain import random
from functrain.nn.init.scaling import Initializer


def normal(stddev: float = 0.01) -> Initializer:
    """Make an initializer of normal numbers with mean 0. Equals `jax.nn.initializers.normal`.

    >>> weight = ft.nn.init.normal(stddev=0.02)(ft.random.key(0), (100, 100))
    >>> weight.std()
    tensor(0.0202)
    """

    def init(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return (random.normal(key, shape, torch.promote_types(dtype, torch.float32)) * stddev).to(dtype)

    return init


def truncated_normal(stddev: float = 0.01, lower: float = -2.0, upper: float = 2.0) -> Initializer:
    """Make an initializer of normal numbers with mean 0 that are cut at `lower` and `upper` times `stddev`.

    Their own standard deviation is smaller, 0.88 of `stddev` where it is cut at two. Equals
    `jax.nn.initializers.truncated_normal`; the bounds of `torch.nn.init.trunc_normal_` are not times the deviation.

    >>> weight = ft.nn.init.truncated_normal(stddev=0.02)(ft.random.key(0), (100, 100))
    >>> weight.std(), weight.abs().max() <= 0.04
    (tensor(0.0178), tensor(True))
    """

    def init(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        return (random.truncated_normal(key, lower, upper, shape, wide) * stddev).to(dtype)

    return init


def uniform(scale: float = 0.01) -> Initializer:
    """Make an initializer of uniform numbers in [0, scale). Equals `jax.nn.initializers.uniform`.

    >>> weight = ft.nn.init.uniform(scale=0.1)(ft.random.key(0), (100, 100))
    >>> weight.mean(), weight.min() >= 0.0, weight.max() < 0.1
    (tensor(0.0499), tensor(True), tensor(True))
    """

    def init(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return (random.uniform(key, shape, torch.promote_types(dtype, torch.float32)) * scale).to(dtype)

    return init


def sparse(sparsity: float, stddev: float = 0.01) -> Initializer:
    """Make an initializer of normal numbers, with that part of the inputs of each output zero, rounded up.

    Shapes: (I, O). Equals `torch.nn.init.sparse_` in distribution, of the transposed matrix. Source: Martens 2010.

    Raises: ValueError for a sparsity outside [0, 1]; at the call, for a shape that is not (I, O).

    >>> weight = ft.nn.init.sparse(0.75)(ft.random.key(0), (8, 3))
    >>> torch.count_nonzero(weight, 0)  # inputs of each output
    tensor([2, 2, 2])
    """
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparse: expected a sparsity in [0, 1], came {sparsity!r}")

    def init(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        if len(shape) != 2:
            raise ValueError(f"sparse: expected a shape (I, O), came {tuple(shape)}; reshape a matrix")
        order_key, value_key = random.split(key).unbind()
        order = torch.argsort(random.uniform(order_key, shape), dim=0, stable=True)  # (I, O)
        rank = torch.argsort(order, dim=0)  # (I, O): of each input among those of its output
        zeros = -int(-sparsity * shape[0] // 1)
        return torch.where(rank < zeros, 0.0, normal(stddev)(value_key, shape, dtype))

    return init
