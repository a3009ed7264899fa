"""Tokens to text as they come: a character that several tokens spell is shown when it is whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from functrain.data import Tokenizer

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def decode_stream(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Give the text of each token as soon as no later token can change it; the pieces may be empty.

    Equals `tokenizer.decode(tokens)`, joined. A character of several bytes may be spelt by several tokens, and until
    the last of them has come its bytes decode to U+FFFD.

    Source: the two offsets are those of Hugging Face's text-generation-inference, `decode_token`.

    >>> list(ft.generation.decode_stream(ft.data.Bytes(), "né".encode()))  # é is two bytes
    ['n', '', 'é', '']
    """
    ids: list[int] = []
    begin = read = 0  # ids[begin:read] are shown; what precedes a token can decide how it begins, as with its space
    shown = ""  # text of ids[begin:] that is shown
    for token in tokens:
        ids.append(int(token))
        text = tokenizer.decode(ids[begin:])
        whole = not text.endswith(_UNKNOWN)
        settled = text if whole else text[:-1]
        yield settled[len(shown) :]
        shown = settled
        if whole:
            begin, read = read, len(ids)
            shown = tokenizer.decode(ids[begin:])
    yield tokenizer.decode(ids[begin:])[len(shown) :]
