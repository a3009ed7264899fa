"""Sentences encoded once into a file: borders, documents and tokens, mapped into memory, and a header that proves them.

N tokens, S sentences, D documents.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from functrain.data.atomic import replacing
from functrain.data.headers import header_path, read_header, write_header
from functrain.data.order import Indices
from functrain.data.pretraining.sentences import SPLIT, Sentences, fingerprint_of, sentences_of, split_sentences
from functrain.data.text import Corpus
from functrain.data.tokenizer import Ids, Tokenizer, ids_dtype
from functrain.progress import Progress


def kept_sentences(corpus: Corpus, tokenizer: Tokenizer, folder: Path, progress: Progress | None) -> Sentences:
    """Encode the sentences of a corpus once: a file in the folder is named by its text, its tokenizer and the split.

    Raises: ValueError as `sentences_of`, and naming a file that is damaged or of another text.
    """
    wanted = hashlib.sha256(f"{corpus.fingerprint} {tokenizer.fingerprint} {SPLIT}".encode()).hexdigest()
    path = folder / f"sentences-{corpus.split}-{wanted[:16]}.bin"
    if not header_path(path).exists():
        _write(path, sentences_of(corpus, tokenizer, split_sentences, progress), tokenizer, wanted)
    return _open(path, tokenizer, wanted)


@dataclass(frozen=True)
class _Header:
    version: int
    sentences: int
    documents: int
    tokens: int
    vocab_size: int
    source: str  # of the text, its tokenizer and the split
    fingerprint: str  # of the numbers


def _write(path: Path, found: Sentences, tokenizer: Tokenizer, source: str) -> None:
    with replacing(path) as file:
        # those of 8 bytes first: a map of the file has all of them at multiples of their size
        for array in (found.borders, found.documents, found.ids):
            file.write(array.astype(array.dtype.newbyteorder("<"), copy=False).data)
    sizes = len(found.borders) - 1, len(found.documents) - 1, len(found.ids)
    write_header(path, _Header(1, *sizes, tokenizer.vocab_size, source, found.fingerprint))


def _open(path: Path, tokenizer: Tokenizer, source: str) -> Sentences:
    header = read_header(path, _Header, "file of sentences")
    again = "; delete the file and its .json to have it written again"
    if header.source != source:
        raise ValueError(f"{path}: expected the sentences of {source}, came those of {header.source}{again}")
    dtype = ids_dtype(header.vocab_size)
    counts = header.sentences + 1, header.documents + 1
    expected = 8 * sum(counts) + header.tokens * dtype.itemsize
    size = path.stat().st_size if path.is_file() else 0
    if size != expected:
        raise ValueError(f"{path}: expected {expected} bytes, came {size}{again}")
    numbers: Indices = np.asarray(np.memmap(path, "<i8", mode="r", shape=(sum(counts),)))
    ids: Ids = np.asarray(np.memmap(path, dtype.newbyteorder("<"), mode="r", offset=8 * sum(counts)))
    borders, documents = numbers[: counts[0]], numbers[counts[0] :]
    fingerprint = fingerprint_of(tokenizer, ids, borders, documents)
    if fingerprint != header.fingerprint:
        raise ValueError(f"{path}: expected fingerprint {header.fingerprint}, came {fingerprint}: it is damaged{again}")
    return Sentences(ids, borders, documents, fingerprint)
