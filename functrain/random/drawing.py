"""Draws: as many words as a shape has elements, in pieces that stay in the cache."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from functrain.random.hashing import counters
from functrain.random.threefry import pieces
from functrain.random.values import Kind


def draw(name: str, key: Tensor, shape: Sequence[int], offset: int, dtype: torch.dtype, kind: Kind) -> Tensor:
    """Draw a tensor of values, `offset` elements after the key's first."""
    check_key(name, key)
    if isinstance(shape, int):
        raise TypeError(f"random.{name}: expected a tuple of sizes, came {shape}; write ({shape},)")
    if offset < 0:
        raise ValueError(f"random.{name}: expected offset >= 0, the flat index of the first element, came {offset}")
    if key.device.type == "meta":  # there are no bits, and a shape of any size costs nothing
        return key.new_empty(tuple(shape), dtype=dtype)
    n = math.prod(shape)
    k = key.unbind()
    cuts = list(pieces(key, offset, offset + n))
    if len(cuts) == 1:
        return kind.of(*kind.words(k, *counters(offset, n, key.device))).reshape(shape)
    out = key.new_empty((n,), dtype=dtype)
    for start, stop in cuts:
        out[start - offset : stop - offset] = kind.of(*kind.words(k, *counters(start, stop - start, key.device)))
    return out.reshape(shape)


# Many draws are the lines of one matrix, each of one key: a loop with a key for each element would read three numbers
# for every one that it draws. The last line of a draw is cut off. Shorter lines waste less, longer ones run faster.
_LINE = 128


def draw_each(keys: Tensor, shapes: Sequence[Sequence[int]], dtype: torch.dtype, kind: Kind) -> list[Tensor]:
    """Draw a tensor of each shape, with the key in its row, in one pass."""
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
        return kind.of(*kind.words(own.unsqueeze(-1).unbind(1), (first >> 32).to(torch.int32), low))

    parts = [slice(start // _LINE, -(-stop // _LINE)) for start, stop in pieces(keys, 0, count * _LINE)]
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


def check_key(name: str, key: Tensor) -> None:
    """Raise TypeError for what is no key."""
    if not isinstance(key, Tensor) or key.shape != (2,) or key.dtype != torch.int32:
        came = f"{tuple(key.shape)} {key.dtype}" if isinstance(key, Tensor) else type(key).__name__
        raise TypeError(
            f"random.{name}: expected a key, an int32 tensor of shape (2,), came {came}; "
            "make one with ft.random.key(seed), or map over a stack of keys with ft.vmap"
        )


def check_keys(name: str, keys: Tensor, count: int) -> None:
    """Raise TypeError for what are not `count` keys."""
    if not isinstance(keys, Tensor) or keys.shape != (count, 2) or keys.dtype != torch.int32:
        came = f"{tuple(keys.shape)} {keys.dtype}" if isinstance(keys, Tensor) else type(keys).__name__
        raise TypeError(
            f"random.{name}: expected a key for each tensor, int32 of shape ({count}, 2), came {came}; make them with "
            f"ft.random.split(key, {count})"
        )
