"""Tokenizers: text to integers and back. Bytes and characters live here, parts of words in `subwords.py`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from functrain.data.atomic import replacing
from functrain.data.special_tokens import SpecialTokens
from functrain.data.text import END

Ids: TypeAlias = NDArray[Any]  # (n,), unsigned, the smallest dtype that holds the vocabulary: `ids_dtype`


class Tokenizer(Protocol):
    """A vocabulary and the two maps. If `lossless`, `decode(encode(text)) == text` for every text it can encode."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def end(self) -> int | None:
        """The token that stands between two documents: `encode(END)` where `END` is in the vocabulary, or None."""

    @property
    def special(self) -> SpecialTokens:
        """The tokens that are no text, by what they are for."""

    @property
    def lossless(self) -> bool:
        """Whether decoding gives back every text that can be encoded; not so for a vocabulary of lower case."""

    @property
    def fingerprint(self) -> str:
        """sha256 of what decides `encode`."""

    def encode(self, text: str) -> Ids: ...

    def decode(self, ids: Sequence[int] | NDArray[Any] | Tensor) -> str: ...

    def save(self, path: str | Path) -> None: ...


class Bytes:
    """The UTF-8 bytes themselves: vocabulary 256, and token 0, which no document contains, ends a document.

    `decode` turns bytes that are no UTF-8 into U+FFFD: a generated text may stop inside a character.
    """

    vocab_size = 256
    end = 0
    special = SpecialTokens(end=0, ids=(0,))
    lossless = True

    @property
    def fingerprint(self) -> str:
        return _sha256(self._json())

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def decode(self, ids: Sequence[int] | NDArray[Any] | Tensor) -> str:
        return checked_ids(ids, self.vocab_size).astype(np.uint8).tobytes().decode("utf-8", "replace")

    def save(self, path: str | Path) -> None:
        with replacing(Path(path)) as file:
            file.write(self._json().encode())

    def _json(self) -> str:
        return json.dumps({"functrain": "bytes"})


class Characters:
    """One token for each character of `text`, numbered in the order of their code points, as nanoGPT does.

    A corpus of several documents has `END` among its characters: `Characters(corpus(..., validation=0.0).text)`.
    """

    def __init__(self, text: str) -> None:
        self.vocabulary = "".join(sorted(set(text)))
        if not self.vocabulary:
            raise ValueError("Characters: expected a text to take the characters of, came an empty one")
        self._points = _code_points(self.vocabulary)  # (vocab_size,) sorted

    lossless = True

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    @property
    def special(self) -> SpecialTokens:
        return SpecialTokens() if self.end is None else SpecialTokens(end=self.end, ids=(self.end,))

    @property
    def end(self) -> int | None:
        return self.vocabulary.index(END) if END in self.vocabulary else None

    @property
    def fingerprint(self) -> str:
        return _sha256(self._json())

    def encode(self, text: str) -> Ids:
        points = _code_points(text)
        ids = np.minimum(np.searchsorted(self._points, points), self.vocab_size - 1)
        unknown = np.flatnonzero(self._points[ids] != points)
        if unknown.size:
            where = int(unknown[0])
            raise ValueError(
                f"Characters: {text[where]!r} at position {where} is none of the {self.vocab_size} characters; "
                "take the vocabulary from a text that has it, such as both sides of the split"
            )
        return ids.astype(ids_dtype(self.vocab_size))

    def decode(self, ids: Sequence[int] | NDArray[Any] | Tensor) -> str:
        return self._points[checked_ids(ids, self.vocab_size)].tobytes().decode("utf-32-le", "surrogatepass")

    def save(self, path: str | Path) -> None:
        with replacing(Path(path)) as file:
            file.write(self._json().encode())

    def _json(self) -> str:
        return json.dumps({"functrain": "characters", "vocabulary": self.vocabulary})


def ids_dtype(vocab_size: int) -> np.dtype[Any]:
    """Give the smallest of uint8, uint16, uint32 that holds every token."""
    return np.dtype(np.uint8 if vocab_size <= 2**8 else np.uint16 if vocab_size <= 2**16 else np.uint32)


def checked_ids(ids: Sequence[int] | NDArray[Any] | Tensor, vocab_size: int) -> NDArray[np.int64]:
    """Give one flat array of tokens, all of them in the vocabulary."""
    array = np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids)
    if array.size == 0:
        return np.zeros(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"decode: expected one row of integers, came shape {array.shape} and dtype {array.dtype}")
    if array.min() < 0 or array.max() >= vocab_size:
        raise ValueError(f"decode: expected tokens in [0, {vocab_size}), came {array.min()} to {array.max()}")
    return array.astype(np.int64)


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.dtype("<u4"))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
