"""Dropout as a function of a key."""

from __future__ import annotations

import torch
from torch import Tensor

from functrain import random
from functrain.sharding.split import drawn


def dropout(x: Tensor, rate: float, key: Tensor | None, *, whole: tuple[int, int] | None = None) -> Tensor:
    """Return x with each element zero with probability `rate`, the others divided by 1 - rate.

    A key decides which, the same ones for the same key and shape, eager, compiled and mapped. Without a key, or at
    rate 0, x itself. Where a plan splits the tokens of a stack, each rank drops what one process would; where its
    tensor axis splits another dimension of x, too, if `whole` says (dimension, its size on all ranks together).
    Source: Srivastava et al. 2014.
    Raises: ValueError for a rate outside [0, 1).

    >>> x = torch.ones(8)
    >>> ft.nn.dropout(x, 0.5, ft.random.key(0))
    tensor([0., 0., 2., 2., 0., 2., 2., 0.])
    >>> ft.nn.dropout(x, 0.5, None) is x  # in evaluation
    True
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout: expected a rate in [0, 1), came {rate}; pass key=None to keep everything")
    if key is None or rate == 0.0:
        return x
    # the bits are int32, uniform on [-2**31, 2**31): a comparison of integers saves making floats of them
    bits = drawn(lambda shape: random.bits(key, shape), x.shape, whole)
    kept = bits >= round(rate * 2**32) - 2**31
    return torch.where(kept, x * (1.0 / (1.0 - rate)), 0.0)
