"""Keys and values of the tokens that a model has read, which generation keeps from one token to the next.

B batch, T tokens read at once, L layers, G heads of keys, K width of a head, C context, W window, S keys kept.

Rows may begin with padding: place p of the cache is the p-th column that was read, whatever stood in it, and a token's
position is the number of tokens of its row before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Cache(NamedTuple):
    """Keys and values of the tokens that have been read; of a layer with a window, of the last ones that it sees."""

    keys: tuple[Tensor, ...]  # L of (B, G, S, K): S is C, and W - 1 of a window
    values: tuple[Tensor, ...]  # L of (B, G, S, K)
    real: Tensor  # (B, C), bool: true where a place that was read holds a token and no padding
    length: Tensor  # (), int64: places read, at most C


class Reading(NamedTuple):
    """What the layers need to know of the next T places."""

    positions: Tensor  # (B, T), int64: of the tokens in their rows
    places: Tensor  # (T,), int64
    masks: dict[int | None, Tensor]  # of each window: (B, 1, T, S), or of a window (B, 1, T, W - 1 + T)


def empty(
    batch: int,
    context: int,
    heads: int,
    width: int,
    windows: Sequence[int | None],
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> Cache:
    """Make a cache that has read nothing, for a layer of each of the windows; one of the context or more is none.

    >>> from functrain.models import cache
    >>> kept = cache.empty(1, 16, 2, 4, windows=[None, 3], dtype=torch.float32, device=None)
    >>> [tuple(keys.shape) for keys in kept.keys]
    [(1, 2, 16, 4), (1, 2, 2, 4)]
    """
    sizes = [context if window is None else window - 1 for window in bounded(windows, context)]
    keys = tuple(torch.zeros((batch, heads, size, width), dtype=dtype, device=device) for size in sizes)
    values = tuple(torch.zeros_like(k) for k in keys)
    real = torch.zeros((batch, context), dtype=torch.bool, device=device)
    return Cache(keys, values, real, torch.zeros((), dtype=torch.int64, device=device))


def bounded(windows: Sequence[int | None], context: int) -> list[int | None]:
    """Return the windows, None in the place of those that hide nothing within the context.

    >>> from functrain.models import cache
    >>> cache.bounded([None, 3, 16], context=16)
    [None, 3, None]
    """
    return [None if window is None or window >= context else window for window in windows]


def reading(cache: Cache, tokens: Tensor, mask: Tensor | None, windows: Sequence[int | None]) -> tuple[Reading, Cache]:
    """Return what the layers need to know of the next tokens (B, T), and the cache that counts their places as read.

    `mask` (B, T) is true where there is a token and no padding.

    >>> from functrain.models import cache
    >>> kept = cache.empty(1, 4, 1, 2, windows=[None], dtype=torch.float32, device=None)
    >>> padded = torch.tensor([[False, True, True]])
    >>> now, kept = cache.reading(kept, torch.tensor([[0, 5, 6]]), padded, [None])
    >>> now.positions, kept.length
    (tensor([[0, 0, 1]]), tensor(3))
    """
    batch, count = tokens.shape
    context = cache.real.shape[1]
    here = torch.ones((batch, count), dtype=torch.bool, device=tokens.device) if mask is None else mask
    before = torch.sum(cache.real, 1, keepdim=True)  # (B, 1)
    positions = (before + torch.cumsum(here.long(), 1) - 1).clamp(min=0)  # (B, T)
    places = cache.length + torch.arange(count, device=tokens.device)  # (T,)
    real = torch.index_copy(cache.real, 1, places, here)  # (B, C)
    masks: dict[int | None, Tensor] = {}
    for window in set(bounded(windows, context)):
        if window is None:
            columns = torch.arange(context, device=tokens.device)  # (C,)
            known = real
        else:
            # the last W - 1 places before these, of which those before the first one were never read
            columns = torch.arange(1 - window, count, device=tokens.device) + cache.length  # (W - 1 + T,)
            known = real[:, columns.clamp(min=0)] & (columns >= 0)
        behind = places[:, None] - columns  # (T, S): how far the key lies behind the query
        sees = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
        masks[window] = sees & known[:, None, None, :]  # (B, 1, T, S)
    return Reading(positions, places, masks), cache._replace(real=real, length=cache.length + count)


def extended(old: Tensor, new: Tensor, now: Reading, window: int | None) -> tuple[Tensor, Tensor]:
    """Return the keys, or values, that the next tokens may see, and what the cache keeps of them.

    Shapes: old (B, G, S, K), new (B, G, T, K); what is seen has as many as the mask of this window.

    >>> from functrain.models import cache
    >>> old, new = torch.zeros(1, 1, 2, 1), torch.ones(1, 1, 3, 1)
    >>> seen, kept = cache.extended(old, new, None, window=3)
    >>> seen.flatten(), kept.flatten()
    (tensor([0., 0., 1., 1., 1.]), tensor([1., 1.]))
    """
    if window is None:
        both = torch.index_copy(old, 2, now.places, new)
        return both, both
    both = torch.cat([old, new], 2)  # (B, G, W - 1 + T, K)
    return both, both[:, :, both.shape[2] - (window - 1) :]
