"""Weights whose variance follows the number of inputs or outputs of a unit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from functrain import random

Dims = int | Sequence[int]


class Initializer(Protocol):
    """Draw a weight of this shape from a key."""

    def __call__(self, key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor: ...


def variance_scaling(
    scale: float,
    mode: Literal["fan_in", "fan_out", "fan_avg", "fan_geo_avg"],
    distribution: Literal["truncated_normal", "normal", "uniform"],
    in_dim: Dims | None = None,
    out_dim: Dims | None = None,
    batch_dim: Dims = (),
) -> Initializer:
    """Make an initializer of mean 0 and variance `scale` / n, n the inputs or outputs of a unit or a mean of the two.

    Dims that are neither inputs, outputs nor batch are those of a kernel, and multiply both. A truncated normal is cut
    at two standard deviations. Half precision is float32 rounded.

    Equals `jax.nn.initializers.variance_scaling`. torch's `kaiming_normal_` and `xavier_normal_` are not truncated:
    they are `variance_scaling(gain**2, mode, "normal")`.

    Raises: ValueError for another mode or distribution or a scale that is not positive; at the call, for a shape that
    is not (I, O) without `in_dim` and `out_dim`.

    >>> init = ft.nn.init.variance_scaling(2.0, "fan_in", "truncated_normal")
    >>> key, shape = ft.random.key(0), (100, 50)
    >>> torch.equal(init(key, shape), ft.nn.init.he_normal()(key, shape))
    True
    """
    if mode not in _MEANS:
        raise ValueError(f"variance_scaling: expected a mode of {', '.join(_MEANS)}, came {mode!r}")
    if distribution not in ("truncated_normal", "normal", "uniform"):
        raise ValueError(
            f"variance_scaling: expected a distribution truncated_normal, normal or uniform, came {distribution!r}"
        )
    if not scale > 0:
        raise ValueError(f"variance_scaling: expected a positive scale, came {scale!r}; ft.nn.init.zeros makes zeros")

    def init(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        deviation = math.sqrt(scale / _MEANS[mode](*_fans(shape, in_dim, out_dim, batch_dim)))
        wide = torch.promote_types(dtype, torch.float32)
        if distribution == "uniform":
            return (random.uniform(key, shape, wide, -1.0, 1.0) * (math.sqrt(3) * deviation)).to(dtype)
        if distribution == "normal":
            return (random.normal(key, shape, wide) * deviation).to(dtype)
        # the standard deviation of a standard normal that is cut at two
        return (random.truncated_normal(key, -2.0, 2.0, shape, wide) * (deviation / 0.87962566103423978)).to(dtype)

    return init


_MEANS = {
    "fan_in": lambda fan_in, fan_out: fan_in,
    "fan_out": lambda fan_in, fan_out: fan_out,
    "fan_avg": lambda fan_in, fan_out: (fan_in + fan_out) / 2,
    "fan_geo_avg": lambda fan_in, fan_out: math.sqrt(fan_in * fan_out),
}

lecun_normal = partial(variance_scaling, 1.0, "fan_in", "truncated_normal")
lecun_uniform = partial(variance_scaling, 1.0, "fan_in", "uniform")
glorot_normal = partial(variance_scaling, 1.0, "fan_avg", "truncated_normal")
glorot_uniform = partial(variance_scaling, 1.0, "fan_avg", "uniform")
he_normal = partial(variance_scaling, 2.0, "fan_in", "truncated_normal")
he_uniform = partial(variance_scaling, 2.0, "fan_in", "uniform")
xavier_normal, xavier_uniform = glorot_normal, glorot_uniform
kaiming_normal, kaiming_uniform = he_normal, he_uniform


def _fans(shape: Sequence[int], in_dim: Dims | None, out_dim: Dims | None, batch_dim: Dims) -> tuple[float, float]:
    """Return how many numbers go into a unit, and out of one."""
    if in_dim is None and out_dim is None and len(shape) == 2:
        in_dim, out_dim = 0, 1
    if in_dim is None or out_dim is None:
        # (O, I, 3, 3) taken for (..., I, O) would have a scale that nobody meant, and train all the same
        raise ValueError(
            f"ft.nn.init: expected a shape (I, O), came {tuple(shape)}; say which dims are inputs and outputs, "
            "in_dim=1 and out_dim=0 for a convolution's (O, I, ...)"
        )
    inputs, outputs, batch = (_product(shape, dims) for dims in (in_dim, out_dim, batch_dim))
    if math.prod(shape) == 0:
        return 1.0, 1.0
    kernel = math.prod(shape) / (inputs * outputs * batch)
    return inputs * kernel, outputs * kernel


def _product(shape: Sequence[int], dims: Dims) -> int:
    return math.prod(shape[dim] for dim in ((dims,) if isinstance(dims, int) else dims))
