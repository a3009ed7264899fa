"""The text of a run as tokens, and what an n-gram model makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy

from functrain.data import (
    Bytes,
    Corpus,
    Tokenizer,
    Tokens,
    corpus,
    load_tokenizer,
    tokenize,
    train_bpe,
)
from functrain.progress import Progress
from functrain.recipes import ngram
from functrain.recipes.config import Data

# what shows how far something is, as a block with its label and what is counted
Bar: TypeAlias = Callable[[str, Any], AbstractContextManager[Progress | None]]

# what learns a tokenizer of so many tokens
Learn: TypeAlias = Callable[[Corpus, int, Progress | None], Tokenizer]


class Texts(NamedTuple):
    tokenizer: Tokenizer
    train: Tokens
    validation: Tokens
    trigram: float  # bits per byte of the validation side, by a model of bytes
    token_trigram: float  # the same by a model of the run's tokens


class Sides(NamedTuple):
    train: Corpus
    validation: Corpus


def read(data: Data) -> Sides:
    """Read both sides of the corpus."""
    return Sides(
        train=corpus(data.corpus, split="train", validation=data.validation),
        validation=corpus(data.corpus, split="validation", validation=data.validation),
    )


def no_bar(label: str, unit: str) -> AbstractContextManager[Progress | None]:
    """Show nothing of what takes long."""
    return nullcontext()


def byte_pairs(side: Corpus, vocabulary: int, progress: Progress | None) -> Tokenizer:
    """Learn byte pairs, or take the bytes where there is no room for more."""
    return Bytes() if vocabulary == 256 else train_bpe(side, vocab_size=vocabulary, progress=progress)


def tokenizer_of(
    sides: Sides, data: Data, run: Path, *, resumed: bool, learn: Learn = byte_pairs, bar: Bar = no_bar
) -> Tokenizer:
    """Learn the tokenizer of a new run; a resumed one keeps that in its folder, which its model was trained with."""
    if resumed:
        return load_tokenizer(run / "tokenizer.json")
    with bar("learning the tokenizer", "characters") as progress:
        return learn(sides.train, data.vocabulary, progress)


def check_lengths(sides: Sides, tokenizer: Tokenizer, context: int) -> str | None:
    """Return a sentence where the validation side is shorter than a window.

    A side of a million characters is not encoded for this. Raises: ValueError where a side is too short.
    """
    counts = [len(side.text) if _is_long(side) else len(tokenize(side, tokenizer).ids) for side in sides]
    name, (train, validation) = sides.train.name, counts
    if train < context + 1:
        raise ValueError(
            f"{name}: expected a text to train on of {context + 1} tokens, for one window of model.context {context}, "
            f"came {train}; give more text or a shorter context"
        )
    if validation < 2:
        raise ValueError(
            f"{name}: expected a validation side of two tokens, for one to be predicted, came {validation}; give more "
            "text or a larger data.validation"
        )
    if validation < context + 1:
        return f"the validation side has {validation} tokens, less than a window of {context + 1}: its loss says little"
    return None


def _is_long(side: Corpus) -> bool:
    return sum(len(document.text) for document in side.documents) > 1_000_000


def encode(sides: Sides, tokenizer: Tokenizer, run: Path, *, bar: Bar = no_bar) -> Texts:
    """Encode both sides; tokenizer and tokens are kept in the folder `run`."""
    train, validation = sides
    tokenizer.save(run / "tokenizer.json")
    tokens = []
    for name, side in (("training", train), ("validation", validation)):
        with bar(f"encoding the {name} text", "characters") as progress:
            tokens.append(tokenize(side, tokenizer, folder=run / "tokens", progress=progress))
    trigram = _trigram(tokenize(train), tokenize(validation))
    token_trigram = trigram if isinstance(tokenizer, Bytes) else _trigram(*tokens)
    return Texts(tokenizer, tokens[0], tokens[1], trigram, token_trigram)


def bits_per_byte(nats_per_token: float, tokens: Tokens) -> float:
    return nats_per_token / (math.log(2) * tokens.bytes_per_token)


def _trigram(train: Tokens, validation: Tokens) -> float:
    nats = ngram.surprisals(train.ids, validation.ids, vocabulary=train.vocab_size, order=3)
    # without the first token, which a model of the next token is not asked for either
    return bits_per_byte(float(numpy.mean(nats[1:])), validation)


class FirstBatches:
    """The first batches of a row of them."""

    def __init__(self, batches: Any, count: int) -> None:
        self._batches, self._count = batches, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> Any:
        return self._batches[i]
