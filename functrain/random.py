"""Random numbers as pure functions of a key: threefry2x32 with 20 rounds, the bits of `jax.random`.

A key is an int32 tensor of shape (2,), the two words of `jax.random.key_data`. Element i of a draw depends on the key
and on i alone (jax's partitionable mode), so a draw is the same bits eager, under `vmap` over keys, under
`torch.compile`, and in pieces: `offset=` is the flat index of the first element. No generator is read or advanced, and
the numbers live on the key's device. Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".

k0 k1 k2 key words, x0 x1 counter words, all int32: torch has no uint32 arithmetic, and int32 wraps to the same bits.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

Finish = Callable[[Tensor, Tensor], Tensor]  # two int32 words per element to one value per element


# ---- keys -------------------------------------------------------------------------------------------------------


def key(seed: int, device: torch.device | str | None = None) -> Tensor:
    """Make a key. Equals `jax.random.key(seed)`, whose default reads the low 32 bits: seeds equal there are one key.

    Raises: TypeError for a seed that is no int; ValueError for one outside [-2**63, 2**64).
    """
    if not isinstance(seed, int):
        raise TypeError(f"random.key: expected an int seed, came {type(seed).__name__}; pass int(seed)")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"random.key: expected a seed in [-2**63, 2**64), came {seed}; take it modulo 2**32")
    return torch.tensor([0, _signed(seed)], dtype=torch.int32, device=device)


def split(key: Tensor, num: int = 2) -> Tensor:
    """Make `num` independent keys, (num, 2). Equals `jax.random.split`."""
    _check_key("split", key)
    return torch.stack(_hash(key, 0, num), dim=-1)


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """Make the key number `data` of the 2**32 keys below `key`. Equals `jax.random.fold_in`.

    A tensor is a () integer, taken modulo 2**32 and never read by the host: other data never recompiles.
    Raises: TypeError for data of another kind; ValueError for an int outside [0, 2**32).
    """
    _check_key("fold_in", key)
    if isinstance(data, Tensor):
        if data.shape != () or data.is_floating_point() or data.is_complex():
            came = f"{tuple(data.shape)} {data.dtype}"
            raise TypeError(f"random.fold_in: expected a () integer tensor, came {came}; map over many with ft.vmap")
        low = data.to(torch.int32)
    elif not isinstance(data, int):
        raise TypeError(f"random.fold_in: expected an int or a () integer tensor, came {type(data).__name__}; pass int")
    elif not 0 <= data < 2**32:
        raise ValueError(f"random.fold_in: expected data in [0, 2**32), came {data}; take it modulo 2**32")
    else:
        low = torch.full((), _signed(data), dtype=torch.int32, device=key.device)
    return torch.stack(_threefry(key.unbind(), 0, low))


# ---- draws ------------------------------------------------------------------------------------------------------


def bits(key: Tensor, shape: Sequence[int] = (), *, offset: int = 0) -> Tensor:
    """Draw 32 random bits per element, int32. Equals `jax.random.bits`, reinterpreted."""
    return _draw("bits", key, shape, offset, torch.int32, lambda x0, x1: x0 ^ x1)


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
    """
    _check_float("uniform", dtype)
    if not minval <= maxval:
        raise ValueError(f"random.uniform: expected minval <= maxval, came {minval} and {maxval}; exchange them")
    if minval == 0.0 and maxval == 1.0:
        return _draw("uniform", key, shape, offset, dtype, lambda x0, x1: _unit(x0, x1, dtype))
    _check_key("uniform", key)
    low, high = (torch.full((), v, dtype=dtype, device=key.device) for v in (minval, maxval))
    span = high - low
    return _draw("uniform", key, shape, offset, dtype, lambda x0, x1: _affine(_unit(x0, x1, dtype), span, low))


def normal(key: Tensor, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32, *, offset: int = 0) -> Tensor:
    """Draw from the standard normal distribution, by inversion.

    Equals `jax.random.normal` to float rounding in float32 and float64; float64 compiled equals eager to rounding only.
    bfloat16 and float16 are float32 draws rounded: jax inverts 7 and 10 random bits there, 128 different numbers.
    """
    _check_float("normal", dtype)
    finish = _normal_from(torch.float64 if dtype == torch.float64 else torch.float32)
    return _draw("normal", key, shape, offset, dtype, lambda x0, x1: finish(x0, x1).to(dtype))


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
    """
    _check_float("truncated_normal", dtype)
    _check_key("truncated_normal", key)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    a, b, eps = math.erf(lower / math.sqrt(2)), math.erf(upper / math.sqrt(2)), torch.finfo(wide).eps
    if not b - a > eps:
        raise ValueError(
            f"random.truncated_normal: [{lower}, {upper}] is empty or holds less than {eps:.0e} of the distribution; "
            "choose lower < upper, nearer to 0"
        )
    low, high = (torch.full((), v, dtype=wide, device=key.device) for v in (a, b))
    span = high - low

    def finish(x0: Tensor, x1: Tensor) -> Tensor:
        inside = torch.clamp(_affine(_unit(x0, x1, wide), span, low), -1 + eps / 2, 1 - eps / 2)
        return torch.clamp(_inverse_normal(inside), lower, upper).to(dtype)

    return _draw("truncated_normal", key, shape, offset, dtype, finish)


def bernoulli(key: Tensor, p: float | Tensor = 0.5, shape: Sequence[int] = (), *, offset: int = 0) -> Tensor:
    """Draw True with probability p, bool. Equals `jax.random.bernoulli`: float32 `uniform(key, shape) < p`.

    Shapes: a tensor p is () or broadcasts to `shape`.
    """
    if isinstance(p, Tensor):
        return uniform(key, shape, offset=offset) < p.to(torch.float32)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"random.bernoulli: expected a probability p in [0, 1], came {p}; clip it")
    return _draw("bernoulli", key, shape, offset, torch.bool, lambda x0, x1: _unit(x0, x1, torch.float32) < p)


def randint(key: Tensor, shape: Sequence[int], minval: int, maxval: int, *, offset: int = 0) -> Tensor:
    """Draw integers from [minval, maxval), int64. Equals the values of `jax.random.randint` in its default int32.

    As there, it is 64 random bits modulo the range, and only 32 when the range is over 2**16: then the probability of
    an integer is off by a factor of up to range / 2**32.
    Raises: ValueError for an empty range or one beyond int32.
    """
    if not -(2**31) <= minval < maxval <= 2**31:
        raise ValueError(
            f"random.randint: expected -2**31 <= minval < maxval <= 2**31, came {minval} and {maxval}; shift the range"
        )
    upper, lower = (_draw("randint", k, shape, offset, torch.int64, _unsigned) for k in split(key).unbind())
    span = maxval - minval
    factor = (2**16 % span) ** 2 % 2**32 % span
    mixed = torch.remainder(upper, span) * factor + torch.remainder(lower, span)
    return torch.remainder(mixed & (2**32 - 1), span) + minval


def bits_of_each(keys: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Draw `bits(key, x.shape)` for each row of a stack of keys (L, 2) and tensor of `like`, all in one pass.

    The results share memory: to keep one is to keep all.
    """
    _check_keys("bits_of_each", keys, len(like))
    return _draw_each(keys, [x.shape for x in like], torch.int32, lambda x0, x1: x0 ^ x1)


def normal_of_each(keys: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Draw `normal(key, x.shape, x.dtype)` for each row of a stack of keys (L, 2) and tensor of `like`, in one pass.

    The results share memory: to keep one is to keep all.
    """
    _check_keys("normal_of_each", keys, len(like))
    for x in like:
        _check_float("normal_of_each", x.dtype)
    drawn: dict[int, Tensor] = {}
    for wide in (torch.float32, torch.float64):
        rows = [i for i, x in enumerate(like) if (x.dtype == torch.float64) == (wide == torch.float64)]
        found = _draw_each(
            keys if len(rows) == len(like) else keys[rows], [like[i].shape for i in rows], wide, _normal_from(wide)
        )
        drawn |= zip(rows, found, strict=True)
    return [drawn[i].to(x.dtype) for i, x in enumerate(like)]


def permutation(key: Tensor, n_or_x: int | Tensor) -> Tensor:
    """Shuffle 0 .. n-1, int64, or the rows of a tensor. An algorithm of its own, not jax's bits.

    It sorts 64 random bits per row, stably. Some two of n rows tie with probability below n**2 / 2**65 (3e-8 for a
    million) and then keep their order: that is the whole bias.
    """
    n = n_or_x.shape[0] if isinstance(n_or_x, Tensor) else n_or_x
    order = torch.argsort(_draw("permutation", key, (n,), 0, torch.int64, _double_word), stable=True)
    return n_or_x[order] if isinstance(n_or_x, Tensor) else order


# ---- bits to values ---------------------------------------------------------------------------------------------


def _unsigned(x0: Tensor, x1: Tensor) -> Tensor:
    return (x0 ^ x1).long() & (2**32 - 1)


def _double_word(x0: Tensor, x1: Tensor) -> Tensor:
    return (x0.long() << 32) | (x1.long() & (2**32 - 1))


_MANTISSA = {torch.bfloat16: (1, 7), torch.float16: (6, 10), torch.float32: (9, 23)}  # bits dropped, bits kept


def _unit(x0: Tensor, x1: Tensor, dtype: torch.dtype) -> Tensor:
    # jax fills the mantissa of a number in [1, 2) and subtracts 1: the same as these integers times a power of two
    if dtype == torch.float64:
        return ((_double_word(x0, x1) >> 12) & (2**52 - 1)).to(dtype).mul_(2.0**-52)
    drop, keep = _MANTISSA[dtype]
    return (x0 ^ x1).bitwise_right_shift_(drop).bitwise_and_(2**keep - 1).to(dtype).mul_(2.0**-keep)


def _affine(unit: Tensor, span: Tensor, low: Tensor) -> Tensor:
    if unit.dtype == torch.float32:
        # float64: XLA rounds unit * span + low once, and there this is exact before the one rounding back
        return (unit.double() * span.double() + low.double()).float()
    return unit * span + low


def _normal_from(dtype: torch.dtype) -> Finish:
    low = -1.0 + torch.finfo(dtype).eps / 2  # the number above -1, so that no draw is infinite
    return lambda x0, x1: _inverse_normal(_unit(x0, x1, dtype).mul_(2.0).add_(low))


# Giles 2011, "Approximating the erfinv function", single precision: erfinv(u) / u in w = -log(1 - u**2),
# as polynomials of w - 2.5 where w < 5 and of sqrt(w) - 3 beyond. Highest power first.
_NEAR = (2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503, -0.00417768164,
         0.246640727, 1.50140941)  # fmt: skip
_FAR = (-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047,
        1.00167406, 2.83297682)  # fmt: skip
# Cephes logf: log(1 + f) = f - f**2 / 2 + f**3 * this, for 1 + f in [sqrt(1/2), sqrt(2)]
_LOG = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
        2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)  # fmt: skip


def _inverse_normal(u: Tensor) -> Tensor:
    # Equals sqrt(2) * erfinv(u), u inside (-1, 1).
    if u.dtype == torch.float64:
        return torch.erfinv(u).mul_(math.sqrt(2))
    # torch.erfinv and torch.log give other bits compiled than eager; sums, products and 1 / sqrt give the same
    u = _once(u)
    w = _once(-_log((1 - u) * (1 + u)))
    near = _polynomial(_NEAR, _once(w - 2.5))
    far = _polynomial(_FAR, _once(w.clamp(min=5.0).rsqrt_().mul_(w).sub_(3.0)))
    return torch.where(w < 5.0, near, far).mul_(u).mul_(math.sqrt(2))


def _log(y: Tensor) -> Tensor:
    word = y.view(torch.int32)
    exponent = (word - 0x3F3504F3) >> 23  # less the bits of sqrt(1/2): what is left is in [sqrt(1/2), sqrt(2))
    f = _once((word - (exponent << 23)).view(torch.float32) - 1.0)
    tail = _polynomial(_LOG, f).mul_(f).sub_(0.5).mul_(f * f)
    return tail.add_(f).add_(exponent.to(torch.float32).mul_(math.log(2)))


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = x * coefficients[0]
    for c in coefficients[1:-1]:
        value.add_(c).mul_(x)
    return value.add_(coefficients[-1])


# ---- the hash ---------------------------------------------------------------------------------------------------

# Eager threefry makes 110 passes over its tensors. Over the whole draw they cost 350 ns an element in memory traffic,
# over blocks that stay in the cache 20. On the CPU a block is as large as torch still computes in the calling thread:
# on two threads its 110 barriers save a third at best, and on a busy machine each waits for a time slice, 5 to 30 times
# the whole. On other devices it is large enough to hide the launches.
_CPU_BLOCK, _DEVICE_BLOCK = 1 << 15, 1 << 22


def _draw(name: str, key: Tensor, shape: Sequence[int], offset: int, dtype: torch.dtype, finish: Finish) -> Tensor:
    _check_key(name, key)
    if isinstance(shape, int):
        raise TypeError(f"random.{name}: expected a tuple of sizes, came {shape}; write ({shape},)")
    if offset < 0:
        raise ValueError(f"random.{name}: expected offset >= 0, the flat index of the first element, came {offset}")
    if key.device.type == "meta":  # there are no bits, and a shape of any size costs nothing
        return key.new_empty(tuple(shape), dtype=dtype)
    n = math.prod(shape)
    pieces = list(_pieces(key, offset, offset + n))
    if len(pieces) == 1:
        return finish(*_hash(key, offset, n)).reshape(shape)
    out = key.new_empty((n,), dtype=dtype)
    for start, stop in pieces:
        out[start - offset : stop - offset] = finish(*_hash(key, start, stop - start))
    return out.reshape(shape)


# Many draws are the lines of one matrix, each of one key: a loop with a key for each element would read three numbers
# for every one that it draws. The last line of a draw is cut off. Shorter lines waste less, longer ones run faster.
_LINE = 128


def _draw_each(keys: Tensor, shapes: Sequence[Sequence[int]], dtype: torch.dtype, finish: Finish) -> list[Tensor]:
    sizes = [math.prod(shape) for shape in shapes]
    if keys.device.type == "meta" or not any(sizes):  # on meta there are no bits, and any size costs nothing
        return [keys.new_empty(tuple(shape), dtype=dtype) for shape in shapes]
    ends = list(itertools.accumulate(-(-size // _LINE) for size in sizes))
    count = ends[-1]
    place = torch.tensor([0, *ends], device=keys.device)
    line = torch.arange(count, device=keys.device)
    owner = torch.searchsorted(place[1:], line, right=True)
    element = (line - place[owner]).mul_(_LINE)

    def some(part: slice) -> Tensor:
        own, first = keys[owner[part]], element[part, None]  # (lines, 2), (lines, 1)
        low = first.to(torch.int32) + torch.arange(_LINE, dtype=torch.int32, device=keys.device)
        return finish(*_threefry(own.unsqueeze(-1).unbind(1), (first >> 32).to(torch.int32), low))

    parts = [slice(start // _LINE, -(-stop // _LINE)) for start, stop in _pieces(keys, 0, count * _LINE)]
    if len(parts) == 1:
        out = some(parts[0])
    else:
        out = keys.new_empty((count, _LINE), dtype=dtype)
        for part in parts:
            out[part] = some(part)
    flat = out.reshape(-1)
    begins = [end * _LINE for end in [0, *ends]]
    return [
        flat[begin : begin + size].reshape(tuple(shape))
        for begin, size, shape in zip(begins, sizes, shapes, strict=False)
    ]


def _pieces(key: Tensor, start: int, stop: int) -> Iterator[tuple[int, int]]:
    # A piece ends at multiples of 2**32, so that its high counter word is one number. Compiled, the draw is one pass
    # anyway; a subclass of Tensor may be fake or spread over devices, where blocks save nothing and cost their number.
    block = _CPU_BLOCK if key.device.type == "cpu" else _DEVICE_BLOCK
    if _compiling() or type(key) is not Tensor:
        block = 2**32
    while True:
        end = min(stop, start + block, (start // 2**32 + 1) * 2**32)
        yield start, end
        if end == stop:
            return
        start = end


def _hash(key: Tensor, start: int, n: int) -> tuple[Tensor, Tensor]:
    # the two words of elements start .. start + n - 1, which share their high counter word
    low = torch.arange(n, dtype=torch.int32, device=key.device).add_(_signed(start))
    return _threefry(key.unbind(), _signed(start >> 32), low)


_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def _threefry(key: Sequence[Tensor], high: int | Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    # In place only on tensors made here: few buffers stay in the cache, and what vmap batches is batched already.
    k0, k1 = key
    if low.device.type == "meta":  # there are no bits, and 110 operations that find their shape take a second a model
        return low + k0, low + k1
    k2 = k0 ^ k1 ^ 0x1BD11BDA
    x0, x1 = (high if isinstance(high, Tensor) else torch.full_like(low, high)) + k0, low + k1
    for i, (add0, add1) in enumerate(((k1, k2), (k2, k0), (k0, k1), (k1, k2), (k2, k0))):
        for r in _ROTATIONS[i % 2]:
            x0, x1 = _once(x0), _once(x1)
            x0 = x0 + x1
            # rotate left by r: the high bits move down without their sign, the low ones up by a product that wraps,
            # which in eager is one pass with the sum; compiled, a product of vectors costs twice a shift
            moved = (x1 >> (32 - r)).bitwise_and_((1 << r) - 1)
            x1 = ((moved | (x1 << r)) if _compiling() else moved.add_(x1, alpha=1 << r)).bitwise_xor_(x0)
        x0.add_(add0)
        x1.add_(add1 + (i + 1))
    return x0, x1


def _once(x: Tensor) -> Tensor:
    # Inductor copies a value into each expression that uses it, which makes 20 rounds a tree of thousands of operations
    # and 13 s of compiling. It computes the input of as_strided, here a view of the same elements, once: 1.5 s, and
    # still one kernel.
    return x.as_strided(x.shape, x.stride()) if _compiling() else x


class _Here(threading.local):
    traced = False


_here = _Here()


@contextmanager
def traced() -> Iterator[None]:
    """Draw inside in the form that compiles well, for a tracer that `torch.compiler.is_compiling()` does not know."""
    before, _here.traced = _here.traced, True
    try:
        yield
    finally:
        _here.traced = before


def _compiling() -> bool:
    return _here.traced or torch.compiler.is_compiling()


def _signed(word: int) -> int:
    return (word + 2**31) % 2**32 - 2**31


# ---- checks -----------------------------------------------------------------------------------------------------


def _check_key(name: str, key: Tensor) -> None:
    if not isinstance(key, Tensor) or key.shape != (2,) or key.dtype != torch.int32:
        came = f"{tuple(key.shape)} {key.dtype}" if isinstance(key, Tensor) else type(key).__name__
        raise TypeError(
            f"random.{name}: expected a key, an int32 tensor of shape (2,), came {came}; "
            "make one with ft.random.key(seed), or map over a stack of keys with ft.vmap"
        )


def _check_keys(name: str, keys: Tensor, count: int) -> None:
    if not isinstance(keys, Tensor) or keys.shape != (count, 2) or keys.dtype != torch.int32:
        came = f"{tuple(keys.shape)} {keys.dtype}" if isinstance(keys, Tensor) else type(keys).__name__
        raise TypeError(
            f"random.{name}: expected a key for each tensor, int32 of shape ({count}, 2), came {came}; make them with "
            f"ft.random.split(key, {count})"
        )


def _check_float(name: str, dtype: torch.dtype) -> None:
    if dtype != torch.float64 and dtype not in _MANTISSA:
        raise TypeError(
            f"random.{name}: expected float32, float64, float16 or bfloat16, came {dtype}; draw float32 and cast"
        )
