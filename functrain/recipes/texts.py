"""The text of a run as tokens, and what an n-gram model makes of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy

from functrain.data import (
    BPE,
    Bytes,
    Corpus,
    Tokenizer,
    Tokens,
    corpus,
    load_tokenizer,
    tokenize,
    train_bpe,
)
from functrain.recipes import ngram
from functrain.recipes.config import Data


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


def encode(sides: Sides, data: Data, run: Path, *, resumed: bool) -> Texts:
    """Encode both sides; tokenizer and tokens are kept in the folder `run`.

    A resumed run keeps the tokenizer that its model was trained with; another one makes its own.
    """
    train, validation = sides
    path = run / "tokenizer.json"
    tokenizer = load_tokenizer(path) if resumed else _new_tokenizer(train, data.vocabulary, path)
    tokens = [tokenize(side, tokenizer, folder=run / "tokens") for side in (train, validation)]
    trigram = _trigram(tokenize(train), tokenize(validation))
    token_trigram = trigram if isinstance(tokenizer, Bytes) else _trigram(*tokens)
    return Texts(tokenizer, tokens[0], tokens[1], trigram, token_trigram)


def bits_per_byte(nats_per_token: float, tokens: Tokens) -> float:
    return nats_per_token / (math.log(2) * tokens.bytes_per_token)


def _new_tokenizer(train: Corpus, vocabulary: int, path: Path) -> Tokenizer:
    tokenizer: Bytes | BPE = Bytes() if vocabulary == 256 else train_bpe(train, vocab_size=vocabulary)
    tokenizer.save(path)
    return tokenizer


def _trigram(train: Tokens, validation: Tokens) -> float:
    nats = ngram.surprisals(train.ids, validation.ids, vocabulary=train.vocab_size, order=3)
    # without the first token, which a model of the next token is not asked for either
    return bits_per_byte(float(numpy.mean(nats[1:])), validation)
