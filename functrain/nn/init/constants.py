"""Weights that nothing draws. They take a key as all initializers do, for its device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from functrain.nn.init.scaling import Initializer


def zeros(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return zeros. Equals `jax.nn.initializers.zeros`.

    >>> ft.nn.init.zeros(ft.random.key(0), (2, 3))
    tensor([[0., 0., 0.],
            [0., 0., 0.]])
    """
    return torch.zeros(tuple(shape), dtype=dtype, device=key.device)


def ones(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ones. Equals `jax.nn.initializers.ones`.

    >>> ft.nn.init.ones(ft.random.key(0), (2, 3))
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    """
    return torch.ones(tuple(shape), dtype=dtype, device=key.device)


def constant(value: float) -> Initializer:
    """Make an initializer of one number. Equals `jax.nn.initializers.constant`.

    >>> ft.nn.init.constant(0.5)(ft.random.key(0), (3,))
    tensor([0.5000, 0.5000, 0.5000])
    """

    def init(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(tuple(shape), value, dtype=dtype, device=key.device)

    return init


def eye(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the identity matrix (I, O): a layer that passes on as many of its inputs as it can.

    Equals `torch.nn.init.eye_`. Raises: ValueError for a shape of other than two dims.

    >>> ft.nn.init.eye(ft.random.key(0), (2, 3))
    tensor([[1., 0., 0.],
            [0., 1., 0.]])
    """
    if len(shape) != 2:
        raise ValueError(f"eye: expected a shape (I, O), came {tuple(shape)}; use dirac() for a convolution")
    return torch.eye(*shape, dtype=dtype, device=key.device)


identity = eye


def dirac(groups: int = 1) -> Initializer:
    """Make an initializer of a convolution's weight (O, I, *kernel) that passes on as many channels as it can.

    Equals `torch.nn.init.dirac_`.

    Raises: at the call, ValueError for a shape of other than three to five dims, or outputs that groups do not divide.

    >>> weight, x = ft.nn.init.dirac()(ft.random.key(0), (2, 2, 3)), torch.arange(8.0).view(1, 2, 4)
    >>> torch.equal(ft.nn.conv(x, weight, padding="same"), x)
    True
    """

    def init(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        if not 3 <= len(shape) <= 5 or shape[0] % groups:
            raise ValueError(
                f"dirac: expected (O, I, *kernel) of 3 to 5 dims whose outputs {groups} divides, came {tuple(shape)}"
            )
        weight = torch.zeros(tuple(shape), dtype=dtype, device=key.device)
        outputs, middle = shape[0] // groups, tuple(size // 2 for size in shape[2:])
        for group in range(groups):
            for channel in range(min(outputs, shape[1])):
                weight[(group * outputs + channel, channel, *middle)] = 1.0
        return weight

    return init
