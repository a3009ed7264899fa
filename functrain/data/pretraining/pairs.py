"""Next sentence prediction: pairs of parts of documents, half of which follow. B batch, T context, R rows."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import index
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from functrain.data.order import Indices, Rows, stream
from functrain.data.pretraining.sentence_files import kept_sentences
from functrain.data.pretraining.sentences import Sentences, sentences_of, split_sentences
from functrain.data.text import Corpus
from functrain.data.tokenizer import Tokenizer
from functrain.progress import Progress


class Chunks(NamedTuple):
    """What rows are made of: sentences `first` to `stop - 1` of `document`."""

    first: Indices  # (R,)
    stop: Indices  # (R,)
    document: Indices  # (R,)


class SentencePairs:
    """An endless row of batches of pairs: `pairs[t]` is a pure function of t; see `sentence_pairs`."""

    def __init__(
        self, given: Sentences, chunks: Chunks, order: Rows, seed: int, context: int, special: tuple[int, int, int]
    ) -> None:
        self.sentences, self.chunks, self.order, self.seed, self.context = given, chunks, order, seed, context
        self.cls, self.sep, self.pad = special

    def __getitem__(self, t: int) -> dict[str, Tensor]:
        t, stop = index(t), self.order.total()
        if not 0 <= t < (2**63 if stop is None else stop):
            expected = "a step t of 0 or more" if stop is None else f"a batch in [0, {stop})"
            raise IndexError(f"sentence_pairs: expected {expected}, came {t}")
        chunk = self.order.indices(t)  # (B,)
        first, stop_sentence, document = (column[chunk] for column in self.chunks)
        # by the number of the row in all epochs: neither the batch size nor what was asked for before has a say
        draws = stream(self.seed, _PAIRS, t * self.order.batch, len(chunk)).T  # (4, B)
        borders, room = self.sentences.borders, self.context - 3
        split = first + 1 + _below(draws[0], stop_sentence - first - 1)  # the first sentence of the second part
        left_stop = right = borders[split]
        wanted = borders[stop_sentence] - right
        other = draws[1] >= np.uint64(2**63)
        elsewhere, found = self._elsewhere(document, wanted, draws[2], draws[3])
        right = np.where(other, elsewhere, right)
        left_length, right_length = _cut(left_stop - borders[first], np.where(other, found, wanted), room)
        return self._batch(left_stop - left_length, left_length, right, right_length, other)

    @property
    def steps_per_epoch(self) -> float:
        """The number of batches of an epoch, a fraction where they go on into the next."""
        return self.order.steps_per_epoch

    @property
    def description(self) -> dict[str, str | int | None]:
        """What decides a batch: of two with equal descriptions, the batches that both have are equal."""
        order = self.order
        return {
            "source": self.sentences.fingerprint,
            "order": "sentence pairs",
            "rows": order.rows,
            "batch": order.batch,
            "seed": self.seed,
            "context": self.context,
            "special": f"{self.cls} {self.sep} {self.pad}",
        }

    @property
    def fingerprint(self) -> str:
        """sha256 of the description, for a checkpoint to keep."""
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()

    def _elsewhere(
        self, document: Indices, wanted: Indices, which: NDArray[np.uint64], where: NDArray[np.uint64]
    ) -> tuple[Indices, Indices]:
        """Give the place of a sentence of another document, and how many of `wanted` tokens there are from it on."""
        documents, borders = self.sentences.documents, self.sentences.borders
        other = _below(which, np.full(len(document), len(documents) - 2))
        other += other >= document
        first, stop = documents[other], documents[other + 1]
        # with as many tokens after it as would follow, if the document has them: lengths do not tell which it is
        latest = np.searchsorted(borders, borders[stop] - wanted, side="right") - 1
        place = borders[first + _below(where, np.clip(latest, first, stop - 1) - first + 1)]
        return place, np.minimum(wanted, borders[stop] - place)

    def _batch(
        self, left: Indices, left_length: Indices, right: Indices, right_length: Indices, other: NDArray[np.bool_]
    ) -> dict[str, Tensor]:
        cell = np.arange(self.context)  # (T,)
        a, b = left_length[:, None], right_length[:, None]  # (B, 1)
        second = cell >= a + 2
        source = np.where(second, right[:, None] + cell - (a + 2), left[:, None] + cell - 1)  # (B, T)
        real = cell < a + b + 3
        tokens = np.take(self.sentences.ids, source, mode="clip").astype(np.int64)
        tokens = np.where((cell == a + 1) | (cell == a + b + 2), self.sep, tokens)
        tokens[:, 0] = self.cls
        tokens[~real] = self.pad
        return {
            "tokens": torch.from_numpy(tokens),
            "token_types": torch.from_numpy((second & real).astype(np.int64)),
            "attention_mask": torch.from_numpy(real),
            "next_sentence": torch.from_numpy(other.astype(np.int64)),
        }


class FiniteSentencePairs(SentencePairs):
    """Batches of pairs that end."""

    def __len__(self) -> int:
        return self.order.total() or 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[t] for t in range(len(self)))


def sentence_pairs(
    documents: Corpus | Iterable[Sequence[str]],
    tokenizer: Tokenizer,
    *,
    batch: int,
    context: int,
    seed: int,
    epochs: int | None = None,
    split: Callable[[str], Sequence[str]] = split_sentences,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> SentencePairs:
    """Give batches of rows `[CLS] first part [SEP] second part [SEP]` for next sentence prediction (NSP).

    Documents are a Corpus, whose texts `split` takes apart, or lists of sentences. Each document is cut into chunks of
    as many sentences as fill a row, each chunk in one row of an epoch, in an order drawn anew for each, and in two
    parts at a place that is drawn. In half of the rows, drawn too, the second part is replaced by as many tokens from
    a sentence on of another document, so that lengths do not tell. Where a row is too short for both, the longer part
    loses tokens until they are as long, the first at its beginning, the second at its end: none is ever empty.
    A document with fewer than two sentences is left out.

    A batch has `tokens`; `token_types`, 1 in the second part and its [SEP]; `attention_mask`, False in padding; and
    `next_sentence`, 0 where the second part follows and 1 where it is of another document. `ft.data.masked` masks it.
    The row of batches has no end unless `epochs` says so; rows do not depend on the batch size.

    With a `folder`, the tokens of a Corpus live in a memory-mapped file there, named by its fingerprint and the
    tokenizer's, and are encoded once: the next call maps them, and checks that they are the same. `progress` counts
    characters of a Corpus, or documents, that are encoded.

    Shapes: (batch, context), int64 and bool; `next_sentence` (batch,), int64.
    Raises: ValueError for a tokenizer without cls, sep or pad tokens, a context under 5, fewer than two documents of
    two sentences, a folder for what has no fingerprint: no Corpus, or a `split` of your own; and naming a file in it
    that is damaged.
    Source: Devlin et al. 2019 (arXiv:1810.04805), section 3.1 and appendix A.2.

    >>> documents = [["to be or", "not to be"], ["that is", "the question", "whether"], ["it is", "nobler"]]
    >>> corpus = ft.data.Corpus("x", "train", tuple(ft.data.Document(s, s) for d in documents for s in d), "f")
    >>> tokenizer = ft.data.train_wordpiece(corpus, vocab_size=100)
    >>> batch = ft.data.sentence_pairs(documents, tokenizer, batch=2, context=12, seed=0)[1]
    >>> [tokenizer.decode(row) for row in batch["tokens"][:, :9].tolist()], batch["next_sentence"]
    (['[CLS] to be or [SEP] it is nobler [SEP]', '[CLS] to be or [SEP] not to be [SEP]'], tensor([1, 0]))
    """
    special = tokenizer.special
    lacking = [name for name in ("cls", "sep", "pad") if getattr(special, name) is None]
    if special.cls is None or special.sep is None or special.pad is None:
        raise ValueError(
            f"sentence_pairs: expected a tokenizer with special tokens cls, sep and pad, came "
            f"{type(tokenizer).__name__} without {', '.join(lacking)}; train one with ft.data.train_wordpiece"
        )
    if index(batch) < 1 or index(context) < 5:
        raise ValueError(
            "sentence_pairs: expected a batch of 1 or more and a context of 5 or more (three special tokens and one of "
            f"each part), came batch={batch}, context={context}"
        )
    if not 0 <= index(seed) < 2**64:
        raise ValueError(f"sentence_pairs: expected a seed in [0, 2**64), came {seed}")
    if epochs is not None and index(epochs) < 1:
        raise ValueError(f"sentence_pairs: expected epochs of 1 or more, came {epochs}")
    if folder is None:
        given = sentences_of(documents, tokenizer, split, progress)
    elif isinstance(documents, Corpus) and split is split_sentences:
        given = kept_sentences(documents, tokenizer, Path(folder), progress)
    else:
        came = "a split of its own" if isinstance(documents, Corpus) else type(documents).__name__
        raise ValueError(
            f"sentence_pairs: folder: expected a Corpus and no split=, whose fingerprint names the file, came {came}; "
            "leave out folder="
        )
    chunks = _chunks(given, index(context) - 3)
    order = Rows(len(chunks.first), index(batch), index(seed), "continued", None if epochs is None else index(epochs))
    made = SentencePairs if epochs is None else FiniteSentencePairs
    return made(given, chunks, order, index(seed), index(context), (special.cls, special.sep, special.pad))


_PAIRS = 2**63 + 1  # no epoch has this number


def _below(draws: NDArray[np.uint64], bounds: Indices) -> Indices:
    """Give numbers from 0 to each bound - 1; modulo: one is likelier than another by less than bound / 2**64."""
    return (draws % bounds.astype(np.uint64)).astype(np.int64)


def _cut(a: Indices, b: Indices, room: int) -> tuple[Indices, Indices]:
    """Take from the longer length until both fit, and from both where each is over half of the room."""
    b = np.minimum(b, np.maximum(room // 2, room - a))
    return np.minimum(a, room - b), b


def _chunks(given: Sentences, room: int) -> Chunks:
    """Cut documents into chunks of as few sentences as fill `room` tokens, of two at least; a last one goes along."""
    found: list[tuple[int, int, int]] = []
    borders, limits = given.borders.tolist(), given.documents.tolist()
    for document, (at, end) in enumerate(zip(limits, limits[1:], strict=False)):
        while at < end:
            stop = min(max(bisect_left(borders, borders[at] + room), at + 2), end)
            stop = end if end - stop == 1 else stop
            found.append((at, stop, document))
            at = stop
    return Chunks(*np.array(found, np.int64).T)
