"""Tokenizers of parts of words: BPE, WordPiece, Unigram, run by the `tokenizers` library from a `tokenizer.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from functrain.data.atomic import replacing
from functrain.data.special_tokens import KEYS, Roles, SpecialTokens, special_tokens
from functrain.data.tokenizer import Ids, checked_ids, ids_dtype


class Subwords:
    """A `tokenizers.Tokenizer` given as the text of its `tokenizer.json`, without its truncation and padding.

    Those are of the batches that a published tokenizer was used for: a text would end after some hundred tokens.
    `roles` says which special token is which, as `tokenizer_config.json` does: `{"mask_token": "[MASK]"}`; what it does
    not say is told by the usual names.
    """

    def __init__(self, definition: str, roles: Roles | None = None) -> None:
        content = json.loads(definition)
        if content.get("truncation") or content.get("padding"):
            # taken out of the text itself, so that the fingerprint is of what decides `encode`
            definition = json.dumps(content | {"truncation": None, "padding": None}, ensure_ascii=False)
        self.definition = definition
        self.roles = dict(roles or {})
        self._tokenizer = library().Tokenizer.from_str(definition)
        added = content.get("added_tokens") or []
        self.special: SpecialTokens = special_tokens(added, self.roles, self._tokenizer.token_to_id)
        self._said_by_names = self.special == special_tokens(added, {}, self._tokenizer.token_to_id)

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def end(self) -> int | None:
        """The token between two documents: that of the end, or else the one after a part of a row, as for RoBERTa."""
        return self.special.sep if self.special.end is None else self.special.end

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.definition.encode()).hexdigest()

    @cached_property
    def lossless(self) -> bool:
        """Whether decoding gives back case, accents, spaces, rare characters and the names of special tokens.

        Tried on a text of each; a tokenizer that was trained on lower case, for one, is not lossless.
        """
        names = [f"a {token} b" for id in self.special.ids if (token := self._tokenizer.id_to_token(id))]
        return all(self.decode(self.encode(text)) == text for text in (*_HARD, *names))

    def encode(self, text: str) -> Ids:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, ids_dtype(self.vocab_size))

    def decode(self, ids: Sequence[int] | NDArray[Any] | Tensor) -> str:
        tokens = checked_ids(ids, self.vocab_size).tolist()
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json`, and beside it `special_tokens_map.json` unless names say which token is what."""
        path = Path(path)
        beside = path.with_name("special_tokens_map.json")
        if not self._said_by_names or beside.is_file():
            with replacing(beside) as file:
                file.write(json.dumps(self.special_names(), indent=2).encode() + b"\n")
        with replacing(path) as file:
            file.write(self.definition.encode())

    def special_names(self) -> dict[str, str | None]:
        """Give the special token of each purpose, by its key in `tokenizer_config.json`; None where there is none."""
        ids = self.special._asdict()
        return {
            key: None if ids[name] is None else self._tokenizer.id_to_token(ids[name]) for name, key in KEYS.items()
        }


_HARD = (
    "Upper lower", "à é Å ﬁ ½ e\u0301 a\u030a", " one  two\t\tthree\n\n four \r\n ", "a,b . c ! don't (x) [y] ##z _",
    "世界 Ω я א 𝄞 \u200b\ufeff\u2028", "\0 a\0", "".join(chr(point) for point in range(0x21, 0x3000, 61)),
)  # fmt: skip


def library() -> ModuleType:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "tokenizers of parts of words (BPE, WordPiece) need the package 'tokenizers'; install it with "
            "`pip install functrain[cli]`, or use the tokenizer functrain.data.Bytes()"
        ) from error
    return tokenizers
