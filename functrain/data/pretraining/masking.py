"""Masked language modelling: batches in which some tokens are to be found again.

B batch, T tokens, K predictions of a row at most, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from operator import index
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from functrain.data.background import Indexable
from functrain.data.order import raw_bits
from functrain.data.pretraining.words import WordParts, word_parts
from functrain.data.tokenizer import Tokenizer
from functrain.tree import Batch


class Masked:
    """Batches with masked tokens; see `masked`."""

    def __init__(
        self,
        batches: Indexable[Any],
        tokenizer: Tokenizer,
        mask: int,
        seed: int,
        rate: float,
        mask_share: float,
        random_share: float,
        words: WordParts | None,
        max_predictions: int | None,
    ) -> None:
        self.batches, self.seed, self.rate, self.max_predictions = batches, seed, rate, max_predictions
        self.mask_share, self.random_share, self.words = mask_share, random_share, words
        self._tokenizer = tokenizer.fingerprint
        self._mask = mask
        self._special = np.zeros(tokenizer.vocab_size, np.bool_)  # (V,)
        self._special[list(tokenizer.special.ids)] = True
        self._ordinary = np.flatnonzero(~self._special)  # what a token may be replaced by

    def __getitem__(self, t: int) -> Batch:
        batch = self.batches[t := index(t)]
        tokens = self._tokens(batch, t)
        legal = ~self._special[tokens] & _real(batch, tokens)  # (B, T)
        # three draws a cell: whether it is chosen, how it is treated, and what replaces it
        draws = raw_bits(self.seed, _MASKING | t, 3 * tokens.size).reshape(3, *tokens.shape)
        share, treatment = draws[0] * 2.0**-64, draws[1] * 2.0**-64
        words = None if self.words is None else self._words(tokens, legal, batch)  # (B, T): of which word a cell is
        if words is not None:
            share = share.reshape(-1)[words]  # one for all cells of a word
        chosen = legal & (share < self.rate)
        if self.max_predictions is not None:
            chosen = _at_most(self.max_predictions, chosen, share, words)
        masked = chosen & (treatment < self.mask_share)
        random = chosen & ~masked & (treatment < self.mask_share + self.random_share)
        replacement = self._ordinary[(draws[2] % np.uint64(len(self._ordinary))).astype(np.int64)]
        inputs = np.where(masked, self._mask, np.where(random, replacement, tokens))
        if self.max_predictions is None:
            found = {"targets": tokens.copy(), "mask": chosen}
        else:
            found = _gathered(self.max_predictions, chosen, tokens)
        return {**batch, "tokens": torch.from_numpy(inputs), **{name: torch.from_numpy(x) for name, x in found.items()}}

    @property
    def description(self) -> dict[str, Any]:
        """What decides every batch; of batches without a description of their own, their type."""
        inner = getattr(self.batches, "description", type(self.batches).__name__)
        return {
            "batches": inner,
            "masked": self.rate,
            "mask_share": self.mask_share,
            "random_share": self.random_share,
            "whole_words": self.words is not None,
            "max_predictions": self.max_predictions,
            "tokenizer": self._tokenizer,
            "masking_seed": self.seed,
        }

    @property
    def fingerprint(self) -> str:
        """sha256 of the description, for a checkpoint to keep."""
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()

    def _tokens(self, batch: Any, t: int) -> NDArray[np.int64]:
        tokens = batch.get("tokens") if isinstance(batch, dict) else None
        if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.dtype != torch.int64:
            came = f"{tuple(tokens.shape)} of {tokens.dtype}" if isinstance(tokens, Tensor) else type(batch).__name__
            raise ValueError(
                f"masked: batch {t}: expected a dict with 'tokens' (B, T) int64, came {came}; give batches such as "
                "those of windows, packed or sentence_pairs"
            )
        found = tokens.numpy()
        if found.size and not 0 <= found.min() <= found.max() < len(self._special):
            raise ValueError(
                f"masked: batch {t}: expected tokens in [0, {len(self._special)}), came {found.min()} to {found.max()}"
                "; give the tokenizer that made them"
            )
        return found

    def _words(self, tokens: NDArray[np.int64], legal: NDArray[np.bool_], batch: Batch) -> NDArray[np.int64]:
        assert self.words is not None
        joined = np.zeros(tokens.shape, np.bool_)
        joined[:, 1:] = self.words.continues[tokens[:, 1:]] & self.words.open[tokens[:, :-1]]
        joined[:, 1:] &= legal[:, 1:] & legal[:, :-1]
        if "documents" in batch:
            documents = batch["documents"].numpy()
            joined[:, 1:] &= documents[:, 1:] == documents[:, :-1]
        return (np.cumsum(~joined) - 1).reshape(tokens.shape)


class FiniteMasked(Masked):
    """Batches with masked tokens that end."""

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        return (self[t] for t in range(len(self)))


def masked(
    batches: Indexable[Any],
    tokenizer: Tokenizer,
    *,
    seed: int,
    rate: float = 0.15,
    mask_share: float = 0.8,
    random_share: float = 0.1,
    whole_words: bool = False,
    max_predictions: int | None = None,
) -> Masked:
    """Choose tokens of each batch at `rate`, to be found again by masked language modelling (MLM), anew at each step.

    Of the chosen ones `mask_share` become the tokenizer's mask token, `random_share` an ordinary token drawn uniformly,
    and the others stay. With `whole_words`, words are chosen, with all their tokens, and each token is treated by
    itself. Special tokens and padding are never chosen: cells outside of `attention_mask`, where a batch has it, or
    else of its `mask`. What is chosen is a function of (seed, t) alone; to give ranks their rows, mask first.

    In a batch, `tokens` become the inputs, `targets` the tokens before, and `mask` is True where one was chosen: what
    `ft.losses.next_token(logits, targets, mask)` takes. Other leaves stay.

    With `max_predictions`, at most K tokens of a row are chosen, of more those that were drawn first, and `places` says
    where they are, in their order: then a model computes logits of these places alone (`places=` of
    `ft.models.bert.apply`), and a vocabulary costs K of T places. `targets` and `mask` are those of the places; what is
    left of a row is place 0 with a false mask. With words, one that does not fit is left out whole.

    Shapes: all (B, T); with `max_predictions`, `places`, `targets` and `mask` (B, K).
    Raises: ValueError for a tokenizer without a mask token, for shares that are none, for predictions below 1; at a
    batch, for tokens that the vocabulary lacks, and for rows of fewer tokens than `max_predictions`.
    Source: Devlin et al. 2019 (arXiv:1810.04805), section 3.1; whole words are those of BERT's later release, and
    `max_predictions` is its `max_predictions_per_seq`.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     _ = Path(folder, "text.txt").write_text("to be or not to be, that is the question " * 10)
    ...     corpus = ft.data.corpus(folder, validation=0.0)
    >>> tokenizer = ft.data.train_wordpiece(corpus, vocab_size=80)
    >>> windows = ft.data.windows(corpus, batch=4, context=16, seed=0, tokenizer=tokenizer)
    >>> batch = ft.data.masked(windows, tokenizer, seed=1)[0]
    >>> batch["mask"].sum(), (batch["tokens"] == tokenizer.special.mask).sum()
    (tensor(12), tensor(9))
    >>> torch.equal(batch["targets"], windows[0]["tokens"])
    True
    >>> batch = ft.data.masked(windows, tokenizer, seed=1, max_predictions=3)[0]
    >>> batch["places"].shape, batch["mask"].sum()
    (torch.Size([4, 3]), tensor(11))
    """
    if tokenizer.special.mask is None:
        raise ValueError(
            f"masked: expected a tokenizer with a mask token, came {type(tokenizer).__name__} without; train one with "
            "ft.data.train_wordpiece, or ft.data.train_bpe(..., special=['<mask>'])"
        )
    if len(tokenizer.special.ids) >= tokenizer.vocab_size:
        raise ValueError(f"masked: all {tokenizer.vocab_size} tokens are special: none is left to be masked")
    if not 0.0 < rate <= 1.0:
        raise ValueError(f"masked: expected a rate in (0, 1], came {rate}; 0.15 is usual")
    if not (mask_share >= 0.0 and random_share >= 0.0 and mask_share + random_share <= 1.0 + 1e-12):
        raise ValueError(
            f"masked: expected shares of 0 or more with a sum of 1 or less, came mask_share={mask_share}, "
            f"random_share={random_share}; the rest stays as it is"
        )
    if not 0 <= index(seed) < 2**64:
        raise ValueError(f"masked: expected a seed in [0, 2**64), came {seed}")
    if max_predictions is not None and index(max_predictions) < 1:
        raise ValueError(
            f"masked: expected max_predictions of 1 or more, came {max_predictions}; about rate * T is usual, 20 of 128"
        )
    made = FiniteMasked if hasattr(batches, "__len__") else Masked
    words, shares = word_parts(tokenizer) if whole_words else None, (mask_share, random_share)
    return made(batches, tokenizer, tokenizer.special.mask, index(seed), rate, *shares, words, max_predictions)


_MASKING = 2**63  # steps are below: the draws of no epoch and of no other batch


def _real(batch: Batch, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
    for name in ("attention_mask", "mask"):
        if (mask := batch.get(name)) is not None:
            return np.asarray(mask.numpy() != 0)
    return np.ones(tokens.shape, np.bool_)


def _at_most(
    count: int, chosen: NDArray[np.bool_], share: NDArray[np.float64], words: NDArray[np.int64] | None
) -> NDArray[np.bool_]:
    """Return those of the chosen (B, T) that were drawn first, at most `count` of a row, and no part of a word."""
    rows, columns = chosen.shape
    if columns < count:
        raise ValueError(f"masked: expected rows of max_predictions={count} tokens or more, came {columns}")
    order = np.argsort(np.where(chosen, share, np.inf), axis=1, kind="stable")  # (B, T): a word's cells are neighbours
    kept = np.zeros((rows, columns), np.bool_)
    np.put_along_axis(kept, order[:, :count], True, axis=1)
    kept &= chosen
    if words is not None:
        cut = np.isin(words, words[chosen & ~kept])  # words of which something is left out
        kept &= ~cut
    return kept


def _gathered(count: int, chosen: NDArray[np.bool_], tokens: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Return places, targets and mask (B, K) of what is chosen (B, T)."""
    places = np.argsort(~chosen, axis=1, kind="stable")[:, :count]  # the chosen ones first, each in its order
    mask = np.take_along_axis(chosen, places, 1)
    places = np.where(mask, places, 0)
    return {"places": places, "targets": np.take_along_axis(tokens, places, 1), "mask": mask}
