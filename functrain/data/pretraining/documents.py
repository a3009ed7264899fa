"""Documents as one flat array of tokens and the borders in it. N tokens, D documents."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from functrain.data.order import Indices
from functrain.data.text import END, Corpus
from functrain.data.tokenizer import Bytes, Ids, Tokenizer
from functrain.data.tokens import Tokens

Row: TypeAlias = NDArray[Any] | Tensor | Sequence[int]
DocumentSource: TypeAlias = Corpus | Tokens | NDArray[Any] | Tensor | Sequence[Row]


@dataclass(frozen=True, eq=False)
class Documents:
    """Document d is `ids[starts[d] : stops[d]]`; `begin` and `end` stand around each, if not None."""

    ids: Ids  # (N,)
    starts: Indices  # (D,)
    stops: Indices  # (D,)
    begin: int | None
    end: int | None
    fingerprint: str


def documents_of(
    caller: str, source: DocumentSource, tokenizer: Tokenizer | None, begin: int | None, end: int | None
) -> Documents:
    """Tell what the documents of a source are.

    Raises: ValueError for what has none, for tokens below 0 or outside the vocabulary; TypeError for another source.
    """
    if isinstance(source, Corpus):
        found = _encoded(caller, source, Bytes() if tokenizer is None else tokenizer, begin, end)
    elif tokenizer is not None:
        raise ValueError(f"{caller}: a tokenizer encodes a corpus, and these are tokens already; drop tokenizer=")
    elif isinstance(source, Tokens) or isinstance(source, (np.ndarray, Tensor)) and source.ndim == 1:
        found = _between(caller, source, begin, end)
    else:
        found = _listed(caller, source, begin, end)
    if not (found.stops > found.starts).any():
        raise ValueError(f"{caller}: expected documents, came {len(found.starts)} with tokens in them; give more text")
    return found


def _encoded(caller: str, corpus: Corpus, tokenizer: Tokenizer, begin: int | None, end: int | None) -> Documents:
    if (end := tokenizer.end if end is None else end) is None:
        raise ValueError(
            f"{caller}: {type(tokenizer).__name__} has no token for the end of a document (the character {END!r}); use "
            "a tokenizer that has it, or give end="
        )
    _check_around(caller, begin, end, tokenizer.vocab_size)
    begin = tokenizer.special.begin if begin is None else begin
    pieces = [tokenizer.encode(document.text) for document in corpus.documents]
    starts, stops = _borders(pieces)
    fingerprint = _digest("encoded", corpus.fingerprint, tokenizer.fingerprint)
    return Documents(np.concatenate(pieces), starts, stops, end if begin is None else begin, end, fingerprint)


def _between(caller: str, source: Tokens | NDArray[Any] | Tensor, begin: int | None, end: int | None) -> Documents:
    if end is None:
        raise ValueError(
            f"{caller}: expected end=, the token that stands between two documents of one row of tokens, came none; "
            "it is the tokenizer's .end"
        )
    ids = source.ids if isinstance(source, Tokens) else _integers(caller, source, "the tokens")
    _check_around(caller, begin, end, source.vocab_size if isinstance(source, Tokens) else None)
    borders = np.flatnonzero(ids == end).astype(np.int64)
    starts, stops = np.concatenate([[0], borders + 1]), np.concatenate([borders, [len(ids)]])
    fingerprint = source.fingerprint if isinstance(source, Tokens) else _hash(ids)
    return Documents(ids, starts, stops, end if begin is None else begin, end, _digest("between", fingerprint))


def _listed(caller: str, source: Any, begin: int | None, end: int | None) -> Documents:
    if isinstance(source, (str, bytes)) or not isinstance(source, (Sequence, np.ndarray, Tensor)):
        raise TypeError(
            f"{caller}: expected a Corpus, Tokens, or rows of tokens, one a document, came {type(source).__name__}"
        )
    _check_around(caller, begin, end, None)
    pieces = [_integers(caller, row, f"document {i}") for i, row in enumerate(source)]
    ids = np.concatenate(pieces) if pieces else np.zeros(0, np.int64)
    starts, stops = _borders(pieces)
    fingerprint = _digest("listed", _hash(ids), _hash(stops))
    return Documents(ids, starts, stops, end if begin is None else begin, end, fingerprint)


def _borders(pieces: Sequence[Ids]) -> tuple[Indices, Indices]:
    stops = np.cumsum(np.array([len(piece) for piece in pieces], np.int64))
    return np.concatenate([[0], stops[:-1]]).astype(np.int64)[: len(stops)], stops


def _integers(caller: str, row: Row, what: str) -> Ids:
    ids = np.asarray(row.cpu() if isinstance(row, Tensor) else row)
    if ids.ndim == 1 and not len(ids):
        return np.zeros(0, np.uint8)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"{caller}: {what}: expected one row of integers, came {ids.shape} of {ids.dtype}")
    if ids.dtype.kind == "i" and ids.min() < 0:
        raise ValueError(
            f"{caller}: {what}: expected tokens of 0 or more, came {ids.min()}; leave out what is no token"
        )
    return ids


def _check_around(caller: str, begin: int | None, end: int | None, vocab_size: int | None) -> None:
    for name, token in (("begin", begin), ("end", end)):
        if token is not None and not 0 <= token < (2**32 if vocab_size is None else vocab_size):
            within = "0 or more" if vocab_size is None else f"[0, {vocab_size})"
            raise ValueError(f"{caller}: expected {name} to be a token in {within}, came {token}")
    if begin is not None and end is None:
        raise ValueError(
            f"{caller}: begin={begin} needs an end= too: by it the last token of a document has a successor"
        )


def _hash(ids: NDArray[Any]) -> str:
    digest = hashlib.sha256(f"{ids.dtype.str} {len(ids)} ".encode())
    digest.update(np.ascontiguousarray(ids).data)
    return digest.hexdigest()


def _digest(*parts: str) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()
