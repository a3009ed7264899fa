"""Batches of packed documents: several whole ones in a row, and little padding. B batch, T context, D documents."""

from __future__ import annotations

import hashlib
from operator import index
from typing import overload

import numpy as np
import torch

from functrain.data.order import Indices, Rows, permuted
from functrain.data.pretraining.documents import Documents, DocumentSource, documents_of
from functrain.data.pretraining.packing import best_fit
from functrain.data.rows import Batches, FiniteBatches
from functrain.data.token_windows import TokenBatch
from functrain.data.tokenizer import Tokenizer


class PackedRows:
    """The rows of an epoch, planned once from the lengths of the documents; see `packed`."""

    def __init__(self, documents: Documents, context: int, seed: int) -> None:
        self.documents, self.context, self.seed = documents, context, seed
        around = (documents.begin is not None) + (documents.end is not None)
        cells = np.maximum(documents.stops - documents.starts + around - 1, 0)  # (D,): tokens that have a successor
        cells[documents.stops == documents.starts] = 0
        cuts = -(-cells // context)  # (D,): pieces of each
        # in an order of their own, so that pieces of one length that share rows are no neighbours
        whole = np.repeat(np.arange(len(cells)), cuts)
        number = np.arange(len(whole)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
        mixed = permuted(np.arange(len(whole)), len(whole), seed, _PIECES) if len(whole) else whole
        self._document, number = whole[mixed], number[mixed]
        self._cells = np.minimum(cells[self._document] - number * context, context)
        first = documents.starts[self._document] - (documents.begin is not None)
        self._first = first + number * context  # in `ids`; one before a document stands `begin`, one after it `end`
        rows = best_fit(self._cells, context)
        order = np.argsort(rows, kind="stable")
        self._document, self._cells, self._first = self._document[order], self._cells[order], self._first[order]
        self._rows = np.concatenate([[0], np.cumsum(np.bincount(rows))])  # (R + 1,): pieces before each row
        self.rows = len(self._rows) - 1

    @property
    def padding(self) -> float:
        """The share of cells that no document lies in."""
        return 1.0 - float(self._cells.sum()) / (self.rows * self.context)

    @property
    def fingerprint(self) -> str:
        given = self.documents
        parts = (given.fingerprint, given.begin, given.end, self.context, self.seed)
        return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()

    def take(self, indices: Indices, in_order: bool) -> TokenBatch:
        given, size = self.documents, len(indices) * self.context
        counts = self._rows[indices + 1] - self._rows[indices]  # (B,)
        row = np.repeat(np.arange(len(indices)), counts)  # (P,): where each piece goes
        piece = np.repeat(self._rows[indices] - (np.cumsum(counts) - counts), counts) + np.arange(len(row))  # (P,)
        cells, first = self._cells[piece], self._first[piece]
        before = np.cumsum(cells) - cells  # (P,): cells in all pieces before
        in_row = before - np.repeat(before[np.cumsum(counts) - counts], counts)
        place = row * self.context + in_row  # (P,): of the first cell

        position = np.arange(cells.sum()) - np.repeat(before, cells)
        cell = np.repeat(place, cells) + position
        source = np.repeat(first, cells) + position
        tokens, targets, positions = (np.zeros(size, np.int64) for _ in range(3))
        documents = np.full(size, -1, np.int64)
        tokens[cell] = np.take(given.ids, source, mode="clip")
        targets[cell] = np.take(given.ids, source + 1, mode="clip")
        positions[cell] = position
        documents[cell] = np.repeat(self._document[piece], cells)
        if given.begin is not None:
            tokens[place[first < given.starts[self._document[piece]]]] = given.begin
        if given.end is not None:
            ends = first + cells == given.stops[self._document[piece]]
            targets[(place + cells - 1)[ends]] = given.end
        found = {"tokens": tokens, "targets": targets, "mask": documents >= 0}
        found |= {"documents": documents, "positions": positions}
        return {name: torch.from_numpy(x.reshape(len(indices), self.context)) for name, x in found.items()}


_PIECES = 2**63  # no epoch has this number


@overload
def packed(
    documents: DocumentSource,
    *,
    batch: int,
    context: int,
    seed: int,
    tokenizer: Tokenizer | None = ...,
    begin: int | None = ...,
    end: int | None = ...,
    epochs: int,
) -> FiniteBatches: ...
@overload
def packed(
    documents: DocumentSource,
    *,
    batch: int,
    context: int,
    seed: int,
    tokenizer: Tokenizer | None = ...,
    begin: int | None = ...,
    end: int | None = ...,
    epochs: None = ...,
) -> Batches: ...
def packed(
    documents: DocumentSource,
    *,
    batch: int,
    context: int,
    seed: int,
    tokenizer: Tokenizer | None = None,
    begin: int | None = None,
    end: int | None = None,
    epochs: int | None = None,
) -> Batches:
    """Give batches of rows that hold several whole documents each, every token a target once per epoch.

    A document is read as `begin`, its tokens, `end`: each token and `end` is the target of the one before. What is
    longer than a row is cut into rows and a rest. Rows are planned once, by best fit, from the lengths alone, and come
    in an order drawn anew for each epoch, which does not depend on the batch size; the row of batches has no end
    unless `epochs` says so.

    `documents` is a Corpus, encoded in memory by `tokenizer` (bytes unless given), with the `end` of the tokenizer and
    its `begin`, if it has one; Tokens or one row of tokens, with `end=`, which stands between two documents; or a list
    of rows of tokens, one for each document. `begin` is `end` unless given; a list without either gives no target to
    the first token of a document. A document without tokens is left out.

    A batch has `tokens`, `targets`, `mask` as of `windows`; `documents`, the number of the document that a cell belongs
    to, in the order given, -1 where there is none; and `positions` in the piece, from 0. Where there is no document,
    tokens, targets and positions are 0 and the mask is False. For a model to see no other document, its attention must
    be told of `documents`: `ft.testing.assert_no_leak` tests it. `.source.padding` is the share of empty cells.

    Shapes: all (batch, context), int64; mask bool.
    Raises: ValueError for documents that have no tokens, tokens below 0 or outside the vocabulary, and an `end` that is
    missing.

    >>> batch = ft.data.packed([[5, 6, 7], [8, 9], [3, 4]], batch=2, context=7, seed=0, end=1)[0]
    >>> batch["tokens"].tolist(), batch["targets"].tolist()
    ([[1, 8, 9, 0, 0, 0, 0], [1, 5, 6, 7, 1, 3, 4]], [[8, 9, 1, 0, 0, 0, 0], [5, 6, 7, 1, 3, 4, 1]])
    >>> batch["documents"].tolist()
    [[1, 1, 1, -1, -1, -1, -1], [0, 0, 0, 0, 2, 2, 2]]
    """
    if index(batch) < 1 or index(context) < 1:
        raise ValueError(f"packed: expected batch and context of 1 or more, came batch={batch}, context={context}")
    if not 0 <= index(seed) < 2**64:
        raise ValueError(f"packed: expected a seed in [0, 2**64), came {seed}")
    if epochs is not None and index(epochs) < 1:
        raise ValueError(f"packed: expected epochs of 1 or more, came {epochs}")
    source = PackedRows(documents_of("packed", documents, tokenizer, begin, end), index(context), index(seed))
    if not source.rows:
        raise ValueError(
            "packed: expected documents of two tokens or more, for one to be predicted, came shorter ones; give end="
        )
    order = Rows(source.rows, index(batch), index(seed), "continued", None if epochs is None else index(epochs))
    return (Batches if epochs is None else FiniteBatches)(source, order, index(seed), None)
