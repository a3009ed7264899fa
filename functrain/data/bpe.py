"""Byte-level byte-pair encoding, trained and run by the `tokenizers` library and kept in its `tokenizer.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from functrain.data.atomic import replacing
from functrain.data.text import END, Corpus
from functrain.data.tokenizer import Bytes, Characters, Ids, Tokenizer, checked_ids, ids_dtype
from functrain.progress import Progress, counter


class BPE:
    """A `tokenizers.Tokenizer` given as the text of its `tokenizer.json`, without its truncation and padding.

    Those are of the batches that a published tokenizer was used for: a text would end after some hundred tokens.
    """

    def __init__(self, definition: str) -> None:
        content = json.loads(definition)
        if content.get("truncation") or content.get("padding"):
            # taken out of the text itself, so that the fingerprint is of what decides `encode`
            definition = json.dumps(content | {"truncation": None, "padding": None}, ensure_ascii=False)
        self.definition = definition
        self._tokenizer = _library().Tokenizer.from_str(definition)

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def end(self) -> int | None:
        token: int | None = self._tokenizer.token_to_id(END)
        return token

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.definition.encode()).hexdigest()

    def encode(self, text: str) -> Ids:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, ids_dtype(self.vocab_size))

    def decode(self, ids: Sequence[int] | NDArray[Any] | Tensor) -> str:
        tokens = checked_ids(ids, self.vocab_size).tolist()
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))

    def save(self, path: str | Path) -> None:
        with replacing(Path(path)) as file:
            file.write(self.definition.encode())


def train_bpe(corpus: Corpus, *, vocab_size: int, progress: Progress | None = None) -> BPE:
    """Learn the merges of a byte-level BPE from the train side of a corpus.

    Any text can be encoded: the 256 bytes are in the vocabulary, and token 0 is `END`. A text too small for
    `vocab_size` gives a smaller vocabulary. Deterministic: same corpus, same library version, same `tokenizer.json`.
    `progress` counts characters that were read; the merges that follow, some seconds, tell nothing.

    Raises: ValueError for the validation side, whose words must not leak; ImportError without `tokenizers`.
    Source: Radford et al. 2019, section 2.2 (the pattern that cuts words is GPT-2's).

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     _ = Path(folder, "text.txt").write_text("to be or not to be " * 10)
    ...     tokenizer = ft.data.train_bpe(ft.data.corpus(folder, validation=0.0), vocab_size=262)
    >>> [tokenizer.decode([token]) for token in tokenizer.encode("to be true")]
    ['to', ' be', ' ', 't', 'r', 'u', 'e']
    """
    if corpus.split != "train":
        raise ValueError(f"train_bpe: expected the train side of {corpus.name!r}, came its {corpus.split!r} side")
    if vocab_size < 257:
        raise ValueError(f"train_bpe: expected a vocabulary of 257 or more (the bytes and END), came {vocab_size}")
    library = _library()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[library.AddedToken(END, special=True, normalized=False)],
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    add = counter(sum(len(document.text) for document in corpus.documents), progress)

    def texts() -> Iterator[str]:
        for document in corpus.documents:
            yield document.text
            add(len(document.text))

    tokenizer.train_from_iterator(texts(), trainer)
    return BPE(tokenizer.to_str(pretty=True))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read what any tokenizer's `save` wrote, or any `tokenizer.json` of the `tokenizers` library.

    Raises: ValueError naming the path when it holds neither.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     ft.data.Characters("hello").save(f"{folder}/tokenizer.json")
    ...     ft.data.load_tokenizer(f"{folder}/tokenizer.json").encode("hole").tolist()
    [1, 3, 2, 0]
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a saved tokenizer, and there is no such file")
    try:
        definition = path.read_bytes().decode("utf-8")
        content = json.loads(definition)
    except ValueError as error:
        raise ValueError(f"{path}: expected the JSON of a tokenizer, came something else ({error})") from None
    match content:
        case {"functrain": "bytes"}:
            return Bytes()
        case {"functrain": "characters", "vocabulary": str(vocabulary)} if vocabulary:
            return Characters(vocabulary)
        case {"model": dict()}:
            return BPE(definition)
    raise ValueError(f"{path}: expected a tokenizer saved by functrain or a `tokenizer.json`, came other JSON")


def _library() -> ModuleType:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "byte-level BPE needs the package 'tokenizers'; install it with `pip install functrain[cli]`, "
            "or use the tokenizer functrain.data.Bytes()"
        ) from error
    return tokenizers
