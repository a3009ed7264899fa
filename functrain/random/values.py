"""From one or two random words an element to a value."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from functrain.random.hashing import Hash, one_word, two_words
from functrain.random.threefry import once


class Kind(NamedTuple):
    """A kind of value: which words it is made of, and how."""

    words: Hash
    of: Callable[..., Tensor]


def _double_word(x0: Tensor, x1: Tensor) -> Tensor:
    return (x0.long() << 32) | (x1.long() & (2**32 - 1))


BITS = Kind(one_word, lambda word: word)  # 32 random bits, int32
UNSIGNED = Kind(one_word, lambda word: word.long() & (2**32 - 1))  # the same, int64
DOUBLE_WORD = Kind(two_words, _double_word)  # 64 random bits, int64


_MANTISSA = {torch.bfloat16: (1, 7), torch.float16: (6, 10), torch.float32: (9, 23)}  # bits dropped, bits kept


def unit(dtype: torch.dtype, then: Callable[[Tensor], Tensor] = lambda x: x) -> Kind:
    """Make the kind of `then` of a number in [0, 1), of as many bits as its mantissa has."""
    # jax fills the mantissa of a number in [1, 2) and subtracts 1: the same as these integers times a power of two
    if dtype == torch.float64:
        mantissa = 2**52 - 1
        return Kind(two_words, lambda x0, x1: then(((_double_word(x0, x1) >> 12) & mantissa).to(dtype).mul_(2.0**-52)))
    drop, keep = _MANTISSA[dtype]
    return Kind(one_word, lambda word: then(((word >> drop) & (2**keep - 1)).to(dtype).mul_(2.0**-keep)))


def affine(unit: Tensor, span: Tensor, low: Tensor) -> Tensor:
    """Return unit * span + low, rounded once in float32."""
    if unit.dtype == torch.float32:
        # float64: XLA rounds unit * span + low once, and there this is exact before the one rounding back
        return (unit.double() * span.double() + low.double()).float()
    return unit * span + low


def normal_in(dtype: torch.dtype, then: Callable[[Tensor], Tensor] = lambda x: x) -> Kind:
    """Make the kind of `then` of a normal number."""
    low = -1.0 + torch.finfo(dtype).eps / 2  # the number above -1, so that no draw is infinite
    return unit(dtype, lambda u: then(inverse_normal(u.mul_(2.0).add_(low))))


# Giles 2011, "Approximating the erfinv function", single precision: erfinv(u) / u in w = -log(1 - u**2),
# as polynomials of w - 2.5 where w < 5 and of sqrt(w) - 3 beyond. Highest power first.
_NEAR = (2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503, -0.00417768164,
         0.246640727, 1.50140941)  # fmt: skip
_FAR = (-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047,
        1.00167406, 2.83297682)  # fmt: skip
# Cephes logf: log(1 + f) = f - f**2 / 2 + f**3 * this, for 1 + f in [sqrt(1/2), sqrt(2)]
_LOG = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
        2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)  # fmt: skip


def inverse_normal(u: Tensor) -> Tensor:
    """Return sqrt(2) * erfinv(u), u inside (-1, 1)."""
    if u.dtype == torch.float64:
        return torch.erfinv(u).mul_(math.sqrt(2))
    # torch.erfinv and torch.log give other bits compiled than eager; sums, products and 1 / sqrt give the same
    u = once(u)
    w = once(-_log((1 - u) * (1 + u)))
    near = _polynomial(_NEAR, once(w - 2.5))
    far = _polynomial(_FAR, once(w.clamp(min=5.0).rsqrt_().mul_(w).sub_(3.0)))
    return torch.where(w < 5.0, near, far).mul_(u).mul_(math.sqrt(2))


def _log(y: Tensor) -> Tensor:
    word = y.view(torch.int32)
    exponent = (word - 0x3F3504F3) >> 23  # less the bits of sqrt(1/2): what is left is in [sqrt(1/2), sqrt(2))
    f = once((word - (exponent << 23)).view(torch.float32) - 1.0)
    tail = _polynomial(_LOG, f).mul_(f).sub_(0.5).mul_(f * f)
    return tail.add_(f).add_(exponent.to(torch.float32).mul_(math.log(2)))


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = x * coefficients[0]
    for c in coefficients[1:-1]:
        value.add_(c).mul_(x)
    return value.add_(coefficients[-1])


def check_float(name: str, dtype: torch.dtype) -> None:
    """Raise TypeError for a dtype that has no draws."""
    if dtype != torch.float64 and dtype not in _MANTISSA:
        raise TypeError(
            f"random.{name}: expected float32, float64, float16 or bfloat16, came {dtype}; draw float32 and cast"
        )
