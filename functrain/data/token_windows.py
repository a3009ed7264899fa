"""Batches of windows over a flat array of tokens. B batch, T context, N tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from operator import index
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

from functrain.data.order import Crops, Epochs
from functrain.data.text import Corpus
from functrain.data.tokenizer import Ids, Tokenizer
from functrain.data.tokens import Tokens, tokenize

TokenBatch: TypeAlias = dict[str, Tensor]  # tokens (B, T) int64, targets (B, T) int64, mask (B, T) bool
Source: TypeAlias = Corpus | Tokens | NDArray[Any] | Tensor


class Windows:
    """An endless row of batches: `windows[t]` is a pure function of t, so any t can be had at any time, by any thread.

    `targets` are `tokens` moved by one; the mask is all True.
    """

    def __init__(self, ids: Ids, order: Crops | Epochs, source: str) -> None:
        self.ids, self.order, self.source = ids, order, source
        self._views = sliding_window_view(ids, order.context + 1)  # (N - T, T + 1), no copy

    def __getitem__(self, t: int) -> TokenBatch:
        t = index(t)
        if not 0 <= t < 2**63:
            raise IndexError(f"windows: expected a step t of 0 or more, came {t}")
        views = self._views[self.order.starts(t)]  # (B, T + 1)
        return _batch(views, np.ones((self.order.batch, self.order.context), np.bool_))

    @property
    def description(self) -> dict[str, str | int]:
        """What decides every batch: two Windows with equal descriptions give equal batches."""
        return {"source": self.source, "order": type(self.order).__name__.lower(), **self.order._asdict()}

    @property
    def fingerprint(self) -> str:
        """sha256 of the description, for a checkpoint to keep."""
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()

    def __reduce__(self) -> Any:  # pickling the views would write every window out
        return Windows, (self.ids, self.order, self.source)


class EvaluationWindows:
    """A finite row of batches that cover everything once; see `evaluation_windows`."""

    def __init__(self, ids: Ids, batch: int, context: int, source: str) -> None:
        self.ids, self.batch, self.context, self.source = ids, batch, context, source

    def __len__(self) -> int:
        return -(-(len(self.ids) - 1) // (self.batch * self.context))

    def __getitem__(self, i: int) -> TokenBatch:
        i = index(i)
        if not 0 <= i < len(self):
            raise IndexError(f"evaluation_windows: expected a batch in [0, {len(self)}), came {i}")
        rows = np.arange(i * self.batch, (i + 1) * self.batch) * self.context
        positions = rows[:, None] + np.arange(self.context + 1)  # (B, T + 1)
        inside = positions < len(self.ids)
        views = np.where(inside, self.ids[np.minimum(positions, len(self.ids) - 1)], 0)
        return _batch(views, inside[:, 1:].copy())

    def __iter__(self) -> Iterator[TokenBatch]:
        return (self[i] for i in range(len(self)))


def windows(source: Source, *, batch: int, context: int, seed: int, tokenizer: Tokenizer | None = None) -> Windows:
    """Give batches that show every window once per epoch, shuffled.

    The windows of an epoch lie side by side, `context` apart, from a phase drawn for the epoch, so that their borders
    differ from epoch to epoch. A batch may begin in one epoch and end in the next: none is short, none is left out.
    A corpus is encoded in memory by `tokenizer`, bytes unless given; tokens are taken as they are, not copied.

    Shapes: `tokens`, `targets`, `mask` of each batch are (batch, context).
    Raises: ValueError when there are fewer than context + 1 tokens.

    >>> windows = ft.data.windows(torch.arange(1000), batch=2, context=8, seed=0)
    >>> batch = windows[500]  # that of step 500, whatever was asked for before
    >>> batch["tokens"].shape, torch.equal(batch["targets"], batch["tokens"] + 1)
    (torch.Size([2, 8]), True)
    """
    ids, fingerprint = _ids(source, tokenizer)
    _check(ids, batch, context, seed)
    return Windows(ids, Epochs(index(batch), index(context), index(seed), len(ids)), fingerprint)


def crops(source: Source, *, batch: int, context: int, seed: int, tokenizer: Tokenizer | None = None) -> Windows:
    """Give batches of windows that start anywhere, drawn uniformly with replacement, as nanoGPT does.

    Arguments, shapes and errors are those of `windows`.

    >>> batch = ft.data.crops(torch.arange(1000), batch=2, context=8, seed=0)[0]  # of step 0
    >>> torch.equal(batch["targets"], batch["tokens"] + 1)
    True
    """
    ids, fingerprint = _ids(source, tokenizer)
    _check(ids, batch, context, seed)
    return Windows(ids, Crops(index(batch), index(context), index(seed), len(ids)), fingerprint)


def evaluation_windows(
    source: Source, *, batch: int, context: int, tokenizer: Tokenizer | None = None
) -> EvaluationWindows:
    """Give the batches in which every token but the first is a target exactly once, in order.

    The sum of a loss over them is the loss of the whole text, whatever the batch size. All batches have the same shape:
    what is missing at the end of the last one is token 0 with mask False.

    >>> batches = ft.data.evaluation_windows(torch.arange(6), batch=2, context=4)
    >>> [(batch["targets"].tolist(), batch["mask"].sum().item()) for batch in batches]
    [([[1, 2, 3, 4], [5, 0, 0, 0]], 5)]
    """
    ids, fingerprint = _ids(source, tokenizer)
    _check(ids, batch, context, 0, tokens=2)
    return EvaluationWindows(ids, batch, context, fingerprint)


def _batch(views: NDArray[Any], mask: NDArray[np.bool_]) -> TokenBatch:
    tokens, targets = views[:, :-1].astype(np.int64), views[:, 1:].astype(np.int64)  # (B, T) each, its own memory
    return {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets), "mask": torch.from_numpy(mask)}


def _ids(source: Source, tokenizer: Tokenizer | None) -> tuple[Ids, str]:
    if isinstance(source, Corpus):
        source = tokenize(source, tokenizer)
    elif tokenizer is not None:
        raise ValueError("windows: a tokenizer encodes a corpus, and these are tokens already; drop tokenizer=")
    if isinstance(source, Tokens):
        return source.ids, source.fingerprint
    ids = source.numpy() if isinstance(source, Tensor) else source
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
        came = f"{ids.shape} of {ids.dtype}" if isinstance(ids, np.ndarray) else repr(type(ids))
        raise ValueError(f"windows: expected a Corpus, Tokens or one row of integers, came {came}")
    if ids.dtype.kind == "i" and len(ids) and ids.min() < 0:
        raise ValueError(f"windows: expected tokens of 0 or more, came {ids.min()}; leave out what is no token")
    digest = hashlib.sha256(f"{ids.dtype.str} {len(ids)} ".encode())
    digest.update(np.ascontiguousarray(ids).data)
    return ids, digest.hexdigest()


def _check(ids: Ids, batch: int, context: int, seed: int, tokens: int | None = None) -> None:
    if batch < 1 or context < 1:
        raise ValueError(f"windows: expected batch and context of 1 or more, came batch={batch}, context={context}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"windows: expected a seed in [0, 2**64), came {seed}")
    needed = context + 1 if tokens is None else tokens
    if len(ids) < needed:
        raise ValueError(
            f"windows: context {context} needs {needed} tokens, came {len(ids)}; give more text or a shorter context"
        )
