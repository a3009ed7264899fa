"""A normal distribution of independent numbers, as a point of its parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import functrain.random as random


class MultiNormalDiagFromLogScale:
    """Independent normal numbers of mean `loc` and standard deviation exp(`log_scale`), which broadcast."""

    def __init__(self, loc: Tensor, log_scale: Tensor) -> None:
        self._mean, self._log_scale = loc, log_scale
        self._param_shape = torch.broadcast_shapes(loc.shape, log_scale.shape)

    def sample(self, shape: Sequence[int], key: Tensor) -> Tensor:
        """Draw (*shape, *parameters), as `ft.random.normal` does."""
        drawn = random.normal(key, (*shape, *self._param_shape), self._mean.dtype)
        return drawn * torch.exp(self._log_scale) + self._mean

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the logarithm of the density, summed over the dimensions of the parameters."""
        z = (x - self._mean) * torch.exp(-self._log_scale)
        each = -0.5 * z * z - self._log_scale - 0.5 * math.log(2 * math.pi)
        dims = tuple(range(-len(self._param_shape), 0))
        return torch.sum(each, dims) if dims else each

    @property
    def log_scale(self) -> Tensor:
        """The logarithms of the standard deviations."""
        return self._log_scale

    @property
    def params(self) -> list[Tensor]:
        """Mean and log_scale."""
        return [self._mean, self._log_scale]


def multi_normal(loc: Tensor, log_scale: Tensor) -> MultiNormalDiagFromLogScale:
    """Return the distribution of independent normal numbers.

    Equals `optax.multi_normal`.

    >>> normal = ft.optim.multi_normal(loc=torch.zeros(2), log_scale=torch.zeros(2))
    >>> normal.log_prob(torch.zeros(2)), normal.sample((5,), ft.random.key(0)).shape
    (tensor(-1.8379), torch.Size([5, 2]))
    """
    return MultiNormalDiagFromLogScale(loc=loc, log_scale=log_scale)
