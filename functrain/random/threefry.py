"""The hash: threefry2x32 with 20 rounds.

k0 k1 k2 key words, x0 x1 counter words, all int32: torch has no uint32 arithmetic, and int32 wraps to the same bits.
Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

# Eager threefry makes 110 passes over its tensors. Over the whole draw they cost 350 ns an element in memory traffic,
# over blocks that stay in the cache 20. On the CPU a block is as large as torch still computes in the calling thread:
# on two threads its 110 barriers save a third at best, and on a busy machine each waits for a time slice, 5 to 30 times
# the whole. On other devices it is large enough to hide the launches.
_CPU_BLOCK, _DEVICE_BLOCK = 1 << 15, 1 << 22


def pieces(key: Tensor, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut the elements from start to stop into parts that are drawn one after another."""
    # A piece ends at multiples of 2**32, so that its high counter word is one number. Compiled, the draw is one pass
    # anyway; a subclass of Tensor may be fake or spread over devices, where blocks save nothing and cost their number.
    block = _CPU_BLOCK if key.device.type == "cpu" else _DEVICE_BLOCK
    if compiling() or type(key) is not Tensor:
        block = 2**32
    while True:
        end = min(stop, start + block, (start // 2**32 + 1) * 2**32)
        yield start, end
        if end == stop:
            return
        start = end


ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def rounds(key: Sequence[Tensor], high: int | Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two words of a key's two words and of counters, element for element."""
    # In place only on tensors made here: few buffers stay in the cache, and what vmap batches is batched already.
    k0, k1 = key
    k2 = k0 ^ k1 ^ 0x1BD11BDA
    x0, x1 = (high if isinstance(high, Tensor) else torch.full_like(low, high)) + k0, low + k1
    for i, (add0, add1) in enumerate(((k1, k2), (k2, k0), (k0, k1), (k1, k2), (k2, k0))):
        for j, r in enumerate(ROTATIONS[i % 2]):
            if i + j:  # a sum with 0 is its other term to Inductor, here a key's word, whose memory it would read
                x0, x1 = once(x0), once(x1)
            x0 = x0 + x1
            # rotate left by r: the high bits move down without their sign, the low ones up by a product that wraps,
            # which in eager is one pass with the sum; compiled, a product of vectors costs twice a shift
            moved = (x1 >> (32 - r)).bitwise_and_((1 << r) - 1)
            x1 = ((moved | (x1 << r)) if compiling() else moved.add_(x1, alpha=1 << r)).bitwise_xor_(x0)
        x0.add_(add0)
        x1.add_(add1 + (i + 1))
    return x0, x1


def once(x: Tensor) -> Tensor:
    """Return x, which a compiler computes once for all its uses."""
    # Inductor copies a value into each expression that uses it, which makes 20 rounds a tree of thousands of operations
    # and 13 s of compiling. It computes the input of as_strided, here a view of the same elements, once: 1.5 s, and
    # still one kernel.
    return x.as_strided(x.shape, x.stride()) if compiling() else x


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


def tracing() -> bool:
    """Tell whether operations are traced by `traced`'s tracer."""
    return _here.traced


def compiling() -> bool:
    """Tell whether operations are traced for a compiler."""
    return _here.traced or torch.compiler.is_compiling()


def signed(word: int) -> int:
    """Return the int32 with the bits of a word in [0, 2**32)."""
    return (word + 2**31) % 2**32 - 2**31
