"""Distributions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from functrain.random.drawing import check_key, check_keys, draw, draw_each
from functrain.random.keys import split
from functrain.random.values import BITS, DOUBLE_WORD, UNSIGNED, affine, check_float, inverse_normal, normal_in, unit


def bits(key: Tensor, shape: Sequence[int] = (), *, offset: int = 0) -> Tensor:
    """Draw 32 random bits per element, int32. Equals `jax.random.bits`, reinterpreted.

    >>> ft.random.bits(ft.random.key(0), (2,))
    tensor([-224768089,  -91998574], dtype=torch.int32)
    """
    return draw("bits", key, shape, offset, torch.int32, BITS)


def uniform(
    key: Tensor,
    shape: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
    minval: float = 0.0,
    maxval: float = 1.0,
    *,
    offset: int = 0,
) -> Tensor:
    """Draw from [minval, maxval), in steps of (maxval - minval) / 2**m; rounding may reach maxval.

    m is 7 for bfloat16, 10 for float16, 23 for float32, 52 for float64.

    Equals `jax.random.uniform` on the CPU; in float64 outside [0, 1) to float rounding, and in float16 on a CPU that
    computes in float16 itself.

    >>> key = ft.random.key(0)
    >>> ft.random.uniform(key, (4,))
    tensor([0.9477, 0.9786, 0.3323, 0.4687])
    >>> ft.random.uniform(key, (2,), offset=1)  # a piece of the same draw
    tensor([0.9786, 0.3323])
    """
    check_float("uniform", dtype)
    if not minval <= maxval:
        raise ValueError(f"random.uniform: expected minval <= maxval, came {minval} and {maxval}; exchange them")
    if minval == 0.0 and maxval == 1.0:
        return draw("uniform", key, shape, offset, dtype, unit(dtype))
    check_key("uniform", key)
    low, high = (torch.full((), v, dtype=dtype, device=key.device) for v in (minval, maxval))
    span = high - low
    return draw("uniform", key, shape, offset, dtype, unit(dtype, lambda u: affine(u, span, low)))


def normal(key: Tensor, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32, *, offset: int = 0) -> Tensor:
    """Draw from the standard normal distribution, by inversion.

    Equals `jax.random.normal` to float rounding in float32 and float64; float64 compiled equals eager to rounding only.
    bfloat16 and float16 are float32 draws rounded: jax inverts 7 and 10 random bits there, 128 different numbers.

    >>> ft.random.normal(ft.random.key(0), (3,))
    tensor([ 1.6226,  2.0253, -0.4336])
    """
    check_float("normal", dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return draw("normal", key, shape, offset, dtype, normal_in(wide, lambda x: x.to(dtype)))


def truncated_normal(
    key: Tensor,
    lower: float,
    upper: float,
    shape: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
    *,
    offset: int = 0,
) -> Tensor:
    """Draw from the standard normal distribution between `lower` and `upper`, by inversion.

    Equals `jax.random.truncated_normal` to float rounding; bfloat16 and float16 are float32 draws rounded.
    Raises: ValueError when the bounds hold less of the distribution than a step of the grid.

    >>> x = ft.random.truncated_normal(ft.random.key(0), -2.0, 2.0, (1000,))
    >>> x.abs().max() <= 2.0, x.std()
    (tensor(True), tensor(0.8643))
    """
    check_float("truncated_normal", dtype)
    check_key("truncated_normal", key)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    a, b, eps = math.erf(lower / math.sqrt(2)), math.erf(upper / math.sqrt(2)), torch.finfo(wide).eps
    if not b - a > eps:
        raise ValueError(
            f"random.truncated_normal: [{lower}, {upper}] is empty or holds less than {eps:.0e} of the distribution; "
            "choose lower < upper, nearer to 0"
        )
    low, high = (torch.full((), v, dtype=wide, device=key.device) for v in (a, b))
    span = high - low

    def finish(u: Tensor) -> Tensor:
        inside = torch.clamp(affine(u, span, low), -1 + eps / 2, 1 - eps / 2)
        return torch.clamp(inverse_normal(inside), lower, upper).to(dtype)

    return draw("truncated_normal", key, shape, offset, dtype, unit(wide, finish))


def bernoulli(key: Tensor, p: float | Tensor = 0.5, shape: Sequence[int] = (), *, offset: int = 0) -> Tensor:
    """Draw True with probability p, bool. Equals `jax.random.bernoulli`: float32 `uniform(key, shape) < p`.

    Shapes: a tensor p is () or broadcasts to `shape`.

    >>> ft.random.bernoulli(ft.random.key(0), torch.tensor([0.0, 0.5, 1.0]), (2, 3))
    tensor([[False, False,  True],
            [False, False,  True]])
    """
    if isinstance(p, Tensor):
        return uniform(key, shape, offset=offset) < p.to(torch.float32)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"random.bernoulli: expected a probability p in [0, 1], came {p}; clip it")
    return draw("bernoulli", key, shape, offset, torch.bool, unit(torch.float32, lambda u: u < p))


def randint(key: Tensor, shape: Sequence[int], minval: int, maxval: int, *, offset: int = 0) -> Tensor:
    """Draw integers from [minval, maxval), int64. Equals the values of `jax.random.randint` in its default int32.

    As there, it is 64 random bits modulo the range, and only 32 when the range is over 2**16: then the probability of
    an integer is off by a factor of up to range / 2**32.
    Raises: ValueError for an empty range or one beyond int32.

    >>> ft.random.randint(ft.random.key(0), (10,), 1, 7)  # dice
    tensor([2, 1, 3, 2, 6, 4, 1, 6, 4, 4])
    """
    if not -(2**31) <= minval < maxval <= 2**31:
        raise ValueError(
            f"random.randint: expected -2**31 <= minval < maxval <= 2**31, came {minval} and {maxval}; shift the range"
        )
    upper, lower = (draw("randint", k, shape, offset, torch.int64, UNSIGNED) for k in split(key).unbind())
    span = maxval - minval
    factor = (2**16 % span) ** 2 % 2**32 % span
    mixed = torch.remainder(upper, span) * factor + torch.remainder(lower, span)
    return torch.remainder(mixed & (2**32 - 1), span) + minval


def bits_of_each(keys: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Draw `bits(key, x.shape)` for each row of a stack of keys (L, 2) and tensor of `like`, all in one pass.

    The results share memory: to keep one is to keep all.

    >>> keys, like = ft.random.split(ft.random.key(0), 2), [torch.zeros(3), torch.zeros(2, 2)]
    >>> torch.equal(ft.random.bits_of_each(keys, like)[1], ft.random.bits(keys[1], (2, 2)))
    True
    """
    check_keys("bits_of_each", keys, len(like))
    return draw_each(keys, [x.shape for x in like], torch.int32, BITS)


def normal_of_each(keys: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Draw `normal(key, x.shape, x.dtype)` for each row of a stack of keys (L, 2) and tensor of `like`, in one pass.

    The results share memory: to keep one is to keep all.

    >>> params = [torch.zeros(3), torch.zeros(2, 2)]
    >>> noise = ft.random.normal_of_each(ft.random.split(ft.random.key(0), len(params)), params)
    >>> [tuple(x.shape) for x in noise]
    [(3,), (2, 2)]
    """
    check_keys("normal_of_each", keys, len(like))
    for x in like:
        check_float("normal_of_each", x.dtype)
    drawn: dict[int, Tensor] = {}
    for wide in (torch.float32, torch.float64):
        rows = [i for i, x in enumerate(like) if (x.dtype == torch.float64) == (wide == torch.float64)]
        found = draw_each(
            keys if len(rows) == len(like) else keys[rows], [like[i].shape for i in rows], wide, normal_in(wide)
        )
        drawn |= zip(rows, found, strict=True)
    return [drawn[i].to(x.dtype) for i, x in enumerate(like)]


def permutation(key: Tensor, n_or_x: int | Tensor) -> Tensor:
    """Shuffle 0 .. n-1, int64, or the rows of a tensor. An algorithm of its own, not jax's bits.

    It sorts 64 random bits per row, stably. Some two of n rows tie with probability below n**2 / 2**65 (3e-8 for a
    million) and then keep their order: that is the whole bias.

    >>> key = ft.random.key(1)
    >>> ft.random.permutation(key, 5)
    tensor([2, 3, 0, 4, 1])
    >>> ft.random.permutation(key, torch.tensor([0, 10, 20, 30, 40]))
    tensor([20, 30,  0, 40, 10])
    """
    n = n_or_x.shape[0] if isinstance(n_or_x, Tensor) else n_or_x
    order = torch.argsort(draw("permutation", key, (n,), 0, torch.int64, DOUBLE_WORD), stable=True)
    return n_or_x[order] if isinstance(n_or_x, Tensor) else order
