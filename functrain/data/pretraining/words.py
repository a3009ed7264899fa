"""Where words begin in a row of tokens, told by the tokens alone. V vocabulary, T tokens."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from functrain.data.subwords import Subwords


class WordParts(NamedTuple):
    """A token belongs to the word of the one before it if it `continues` one, and that one is `open`."""

    continues: NDArray[np.bool_]  # (V,)
    open: NDArray[np.bool_]  # (V,)


def word_parts(tokenizer: Any) -> WordParts:
    """Tell which tokens of a vocabulary go on with a word.

    Those of WordPiece say so by a prefix, `##`. Of byte-level BPE and of those that write a space as "▁", a token goes
    on if it begins with a letter, a digit, "_" or a part of a character beyond ASCII, and the one before ends so.

    Raises: ValueError for a tokenizer whose tokens are no parts of words.
    """
    if isinstance(tokenizer, Subwords):
        content = json.loads(tokenizer.definition)
        model = content["model"]
        vocabulary: Any = model.get("vocab") or []
        names: list[str] = [""] * tokenizer.vocab_size
        for id, name in (
            ((id, name) for name, id in vocabulary.items())
            if isinstance(vocabulary, dict)
            else enumerate(name for name, _ in vocabulary)
        ):
            names[id] = name
        special = np.zeros(len(names), np.bool_)
        special[list(tokenizer.special.ids)] = True
        if model.get("type") == "WordPiece":
            prefix = model.get("continuing_subword_prefix", "##")
            return WordParts(np.array([name.startswith(prefix) for name in names]) & ~special, ~special)
        spaced = any(kind in json.dumps([content.get("pre_tokenizer"), content.get("decoder")]) for kind in _SPACED)
        if spaced:
            texts = [_bytes(name) for name in names]
            first = np.array([bool(text) and _within(text[0]) for text in texts]) & ~special
            # a space that was not merged belongs to the word after it, as one that was
            last = np.array([text == b" " or bool(text) and _within(text[-1]) for text in texts]) & ~special
            return WordParts(first, last)
    raise ValueError(
        f"word_parts: expected a tokenizer of WordPiece, byte-level BPE or with '▁' for a space, came "
        f"{type(tokenizer).__name__}; mask tokens, not whole words"
    )


def _within(byte: int) -> bool:
    return byte >= 0x80 or chr(byte).isalnum() or byte == ord("_")


_SPACED = ('"ByteLevel"', '"Metaspace"', "▁", "\\u2581")


def _bytes(name: str) -> bytes:
    """Give the bytes of a token, whose characters stand for a byte each, or else are themselves and "▁" a space."""
    if all(character in _BYTE for character in name):
        return bytes(_BYTE[character] for character in name)
    return name.replace("▁", " ").encode("utf-8", "surrogatepass")


def _byte_of() -> dict[str, int]:
    """Undo the alphabet of byte-level BPE: printable Latin-1 stands for itself, the others for 256 and on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE = _byte_of()
