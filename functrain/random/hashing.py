"""Words from a key and counters: in eager by 110 operations, in a trace by one.

`torch.compile` sees the 110. The tracer of `compiler` says of itself that it traces, and gives the one operation to
torch's compiler as one loop: written out, each draw, and each split of a key, takes that compiler 2 s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrain.random.threefry import compiling, rounds, signed, tracing

# a key's two words, the high counter word and the low ones to one or two words an element
Hash = Callable[[Sequence[Tensor], int | Tensor, Tensor], tuple[Tensor, ...]]


def two_words(key: Sequence[Tensor], high: int | Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """Return both words, each of the shape that key and counters broadcast to."""
    if low.device.type == "meta":  # there are no bits, and 110 operations that find their shape take a second a model
        return low + key[0], low + key[1]
    if tracing():
        counter = _tensor(high, low)
        return WORD(*key, counter, low, 0), WORD(*key, counter, low, 1)
    return rounds(key, high, low)


def one_word(key: Sequence[Tensor], high: int | Tensor, low: Tensor) -> tuple[Tensor]:
    """Return the exclusive or of both words."""
    if tracing() and low.device.type != "meta":
        return (WORD(*key, _tensor(high, low), low, 2),)
    x0, x1 = two_words(key, high, low)
    return (x0 ^ x1,)


def pairs(key: Sequence[Tensor], high: int | Tensor, low: Tensor) -> Tensor:
    """Return both words side by side, (..., 2)."""
    if tracing() and low.device.type != "meta":
        return PAIRS(*key, _tensor(high, low), low)
    return torch.stack(two_words(key, high, low), dim=-1)


def counters(start: int, n: int, device: torch.device) -> tuple[int, Tensor]:
    """Return the counter words of elements start to start + n - 1, which share the high one."""
    low = torch.arange(n, dtype=torch.int32, device=device)
    if start:
        low = low + signed(start) if compiling() else low.add_(signed(start))
    return signed(start >> 32), low


def _tensor(high: int | Tensor, low: Tensor) -> Tensor:
    return high if isinstance(high, Tensor) else torch.full((), high, dtype=torch.int32, device=low.device)


_library = torch.library.Library("functrain", "FRAGMENT")
_FOUR = "Tensor k0, Tensor k1, Tensor high, Tensor low"
# word: 0, 1, or 2 for the exclusive or of both
_library.define(f"threefry({_FOUR}, int word) -> Tensor", tags=(torch.Tag.pointwise,))
_library.define(f"threefry_pairs({_FOUR}) -> Tensor")
WORD, PAIRS = torch.ops.functrain.threefry.default, torch.ops.functrain.threefry_pairs.default


def _word(k0: Tensor, k1: Tensor, high: Tensor, low: Tensor, word: int) -> Tensor:
    x0, x1 = _both(k0, k1, high, low)
    return (x0, x1, x0 ^ x1)[word]


def _pairs(k0: Tensor, k1: Tensor, high: Tensor, low: Tensor) -> Tensor:
    return torch.stack(_both(k0, k1, high, low), dim=-1)


def _both(k0: Tensor, k1: Tensor, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    shape = _shape(k0, k1, high, low)
    return rounds((k0, k1), high.expand(shape), low.expand(shape))


def _shape(*tensors: Tensor) -> torch.Size:
    return torch.broadcast_shapes(*(x.shape for x in tensors))


def _mapped(operation: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    """Make the rule of `torch.vmap`: what is mapped comes first, and shapes are of equal rank behind it."""

    def rule(_: Any, dims: Sequence[int | None], *args: Any) -> tuple[Tensor, int]:
        moved = [x if dim is None else x.movedim(dim, 0) for x, dim in zip(args[:4], dims, strict=False)]
        rank = max(x.dim() - (dim is not None) for x, dim in zip(moved, dims, strict=False))
        alike = [
            x if dim is None else x.reshape(len(x), *[1] * (rank + 1 - x.dim()), *x.shape[1:])
            for x, dim in zip(moved, dims, strict=False)
        ]
        return operation(*alike, *args[4:]), 0

    return rule


_library.impl("threefry", _word, "CompositeExplicitAutograd")
_library.impl("threefry_pairs", _pairs, "CompositeExplicitAutograd")
torch.library.register_fake("functrain::threefry", lambda *x: x[3].new_empty(_shape(*x[:4])), lib=_library)
torch.library.register_fake("functrain::threefry_pairs", lambda *x: x[3].new_empty((*_shape(*x), 2)), lib=_library)
torch.library.register_vmap("functrain::threefry", _mapped(WORD), lib=_library)
torch.library.register_vmap("functrain::threefry_pairs", _mapped(PAIRS), lib=_library)
