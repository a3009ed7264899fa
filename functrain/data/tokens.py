"""Token files: a corpus encoded once into a flat array on disk, mapped into memory, with a header that proves it."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from functrain.data.atomic import replacing
from functrain.data.headers import header_path, read_header, write_header
from functrain.data.text import END, Corpus
from functrain.data.tokenizer import Bytes, Ids, Tokenizer, ids_dtype
from functrain.progress import Progress, counter


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of the documents in order, the token `end` between each two: `tokenizer.encode(corpus.text)`."""

    ids: Ids  # (N,)
    vocab_size: int
    size_bytes: int  # UTF-8 bytes of the text
    corpus: str  # fingerprint
    tokenizer: str  # fingerprint

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self.corpus, self.tokenizer)

    @property
    def bytes_per_token(self) -> float:
        """A loss of x nats per token is x / (ln 2 * bytes_per_token) bits per byte."""
        return self.size_bytes / len(self.ids)


def tokenize(
    corpus: Corpus,
    tokenizer: Tokenizer | None = None,
    *,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> Tokens:
    """Encode a corpus, with the byte tokenizer unless another is given.

    With a folder the tokens live in a memory-mapped file there, named by both fingerprints, and are encoded once: the
    next call maps the same file. Without a folder they live in memory. The two are equal. `progress` counts characters.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     _ = Path(folder, "a.txt").write_text("ab"), Path(folder, "b.txt").write_text("c")
    ...     ft.data.tokenize(ft.data.corpus(folder, validation=0.0)).ids.tolist()  # bytes, and 0 between two documents
    [97, 98, 0, 99]
    """
    tokenizer = Bytes() if tokenizer is None else tokenizer
    texts = told(corpus, progress)
    if folder is None:
        pieces = list(_pieces(texts, tokenizer))
        ids = np.concatenate([ids for ids, _ in pieces])
        size_bytes = sum(size for _, size in pieces)
        return Tokens(ids, tokenizer.vocab_size, size_bytes, corpus.fingerprint, tokenizer.fingerprint)
    fingerprint = _fingerprint(corpus.fingerprint, tokenizer.fingerprint)
    path = Path(folder) / f"{corpus.split}-{fingerprint[:16]}.bin"
    if not header_path(path).exists():
        write_tokens(path, texts, tokenizer, corpus=corpus.fingerprint)
    tokens = open_tokens(path)
    if tokens.fingerprint != fingerprint:
        raise ValueError(
            f"{path}: expected tokens with fingerprint {fingerprint}, came {tokens.fingerprint}; "
            "delete the file and its .json to have it written again"
        )
    return tokens


def told(corpus: Corpus, progress: Progress | None) -> Iterator[str]:
    """Give the texts of a corpus, and tell which of them have been taken."""
    add = counter(sum(len(document.text) for document in corpus.documents), progress)
    for document in corpus.documents:
        yield document.text
        add(len(document.text))


def write_tokens(path: str | Path, texts: Iterable[str], tokenizer: Tokenizer, *, corpus: str) -> None:
    """Write the tokens of `texts`, one document at a time, to `path` and their header to `path` with suffix `.json`.

    Each file appears whole or not at all, and the header last: without it there is no token file. `corpus` is any
    text that identifies the documents; `tokenize` uses the corpus's fingerprint.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     ft.data.write_tokens(f"{folder}/train.bin", ["ab", "c"], ft.data.Bytes(), corpus="mine")
    ...     ft.data.open_tokens(f"{folder}/train.bin").ids.tolist()  # 0 stands between two documents
    [97, 98, 0, 99]
    """
    path = Path(path)
    if path.suffix == ".json":
        raise ValueError(f"{path}: the header takes the name with .json; call the token file .bin")
    count = size_bytes = checksum = 0
    with replacing(path) as file:
        for ids, size in _pieces(texts, tokenizer):
            data = ids.astype(ids.dtype.newbyteorder("<"), copy=False).tobytes()
            file.write(data)
            checksum = zlib.crc32(data, checksum)
            count += len(ids)
            size_bytes += size
        if not count:
            raise ValueError(f"{path}: expected documents to write tokens of, came no text at all")
    dtype = ids_dtype(tokenizer.vocab_size).name
    header = _Header(1, dtype, count, size_bytes, tokenizer.vocab_size, corpus, tokenizer.fingerprint, checksum)
    write_header(path, header)


def open_tokens(path: str | Path) -> Tokens:
    """Map a token file into memory, after checking it against its header: size, dtype and checksum.

    Raises: ValueError naming the file and what does not fit.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     ft.data.write_tokens(f"{folder}/train.bin", ["to be"], ft.data.Bytes(), corpus="mine")
    ...     ft.data.open_tokens(f"{folder}/train.bin").ids.tolist()  # a source for ft.data.windows
    [116, 111, 32, 98, 101]
    """
    path = Path(path)
    header = read_header(path, _Header, "token file")
    dtype = ids_dtype(header.vocab_size)
    if header.dtype != dtype.name:
        raise ValueError(f"{path}: a vocabulary of {header.vocab_size} is kept as {dtype}, came {header.dtype!r}")
    size = path.stat().st_size if path.is_file() else 0
    if size == 0 or size != header.count * dtype.itemsize:
        raise ValueError(
            f"{path}: expected {header.count} tokens of {dtype}, came {size} bytes; "
            "delete the file and its .json to have it written again"
        )
    # the plain array over the map: indexing the memmap class costs several microseconds more
    ids = np.asarray(np.memmap(path, dtype.newbyteorder("<"), mode="r"))
    checksum = 0
    for start in range(0, header.count, 1 << 24):
        checksum = zlib.crc32(ids[start : start + (1 << 24)].data, checksum)
    if checksum != header.crc32:
        raise ValueError(
            f"{path}: expected crc32 {header.crc32}, came {checksum}: the file is damaged; "
            "delete it and its .json to have it written again"
        )
    return Tokens(ids, header.vocab_size, header.size_bytes, header.corpus, header.tokenizer)


@dataclass(frozen=True)
class _Header:
    version: int
    dtype: str
    count: int
    size_bytes: int
    vocab_size: int
    corpus: str
    tokenizer: str
    crc32: int


def _pieces(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[Ids, int]]:
    """Give tokens and size in bytes of each document, with those of END before all but the first."""
    for number, text in enumerate(texts):
        if number:
            if tokenizer.end is None:
                raise ValueError(
                    f"tokenize: {type(tokenizer).__name__} has no token for the end of a document (the character "
                    f"{END!r}) and there are several documents; use a tokenizer that has it"
                )
            yield np.array([tokenizer.end], ids_dtype(tokenizer.vocab_size)), len(END)
        yield tokenizer.encode(text), len(text.encode("utf-8"))


def _fingerprint(corpus: str, tokenizer: str) -> str:
    return sha256(f"{corpus} {tokenizer}".encode()).hexdigest()
