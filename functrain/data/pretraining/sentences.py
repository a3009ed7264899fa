"""Documents as rows of sentences, each a row of tokens. N tokens, S sentences, D documents."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from functrain.data.order import Indices
from functrain.data.text import Corpus
from functrain.data.tokenizer import Ids, Tokenizer
from functrain.data.tokens import told
from functrain.progress import Progress, counter

_END = re.compile(r"(?<=[.!?])\s+|\n\s*")

SPLIT = f"split_sentences at {_END.pattern}"
"""What tells the sentences of `split_sentences` from those of another way to split, for who keeps them."""


@dataclass(frozen=True, eq=False)
class Sentences:
    """Sentence s is `ids[borders[s] : borders[s + 1]]`; document d has those from `documents[d]` on."""

    ids: Ids  # (N,)
    borders: Indices  # (S + 1,)
    documents: Indices  # (D + 1,)
    fingerprint: str


def split_sentences(text: str) -> list[str]:
    """Split a text after `.`, `!` and `?` before a space, and at line breaks, leaving out what is empty.

    >>> from functrain.data.pretraining.sentences import split_sentences
    >>> split_sentences("To be or not. To be? That\\n\\nis 1.5 questions.")
    ['To be or not.', 'To be?', 'That', 'is 1.5 questions.']
    """
    return [stripped for part in _END.split(text) if (stripped := part.strip())]


def sentences_of(
    source: Corpus | Iterable[Sequence[str]],
    tokenizer: Tokenizer,
    split: Callable[[str], Sequence[str]],
    progress: Progress | None = None,
) -> Sentences:
    """Encode the documents that have two sentences with tokens, or more; others are left out.

    Raises: TypeError for documents that are no lists of sentences; ValueError for fewer than two documents.
    """
    if isinstance(source, Corpus):
        source = (split(text) for text in told(source, progress))
    elif progress is not None:
        source = _counted(source, progress)
    pieces: list[NDArray[np.generic]] = []
    borders, documents, given = [0], [0], 0
    for given, document in enumerate(source, 1):  # noqa: B007
        if isinstance(document, str) or not all(isinstance(sentence, str) for sentence in document):
            raise TypeError(
                f"sentence_pairs: document {given - 1}: expected a list of sentences, each a text, came "
                f"{type(document).__name__}; split a text, or give a Corpus"
            )
        found = [ids for sentence in document if len(ids := tokenizer.encode(sentence))]
        if len(found) < 2:
            continue
        pieces += found
        borders += (borders[-1] + np.cumsum([len(ids) for ids in found])).tolist()
        documents.append(documents[-1] + len(found))
    if len(documents) < 3:
        raise ValueError(
            "sentence_pairs: expected two documents of two sentences or more, so that a second part can be of another "
            f"document, came {len(documents) - 1} among {given}; give more text, or another split="
        )
    ids = np.concatenate(pieces)
    numbers = np.array(borders, np.int64), np.array(documents, np.int64)
    return Sentences(ids, *numbers, fingerprint_of(tokenizer, ids, *numbers))


def fingerprint_of(tokenizer: Tokenizer, *arrays: Ids | Indices) -> str:
    """Return the sha256 of a tokenizer and the arrays of sentences that it has encoded: ids, borders, documents."""
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    for array in (array.astype(array.dtype.newbyteorder("<"), copy=False) for array in arrays):
        digest.update(f"{array.dtype.str} {len(array)} ".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _counted(source: Iterable[Sequence[str]], progress: Progress) -> Iterator[Sequence[str]]:
    """Give documents that are lists of sentences, and tell how many have been taken, of as many as there are."""
    documents = list(source)
    add = counter(len(documents), progress)
    for document in documents:
        yield document
        add(1)
