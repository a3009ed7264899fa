"""Tokenizers read from their files."""

from __future__ import annotations

import json
from pathlib import Path

from functrain.data.special_tokens import roles_of
from functrain.data.subwords import Subwords
from functrain.data.tokenizer import Bytes, Characters, Tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read what any tokenizer's `save` wrote, or any `tokenizer.json` of the `tokenizers` library, or its folder.

    What special tokens are for (`.special.mask`, `.special.cls`, ...) is said by `tokenizer_config.json` and
    `special_tokens_map.json` beside the file, and by the usual names where those are silent. Encoding neither pads nor
    cuts, whatever the file says, and adds no special token. `.lossless` says whether decoding gives back the text.

    Raises: ValueError naming the file when it holds no tokenizer, or names a special token that the vocabulary lacks.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     ft.data.Characters("hello").save(f"{folder}/tokenizer.json")
    ...     ft.data.load_tokenizer(f"{folder}/tokenizer.json").encode("hole").tolist()
    [1, 3, 2, 0]
    """
    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
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
            try:
                return Subwords(definition, roles_of(path.parent))
            except ValueError as error:
                raise ValueError(f"{path}: {error}" if str(path.parent) not in str(error) else str(error)) from None
    raise ValueError(f"{path}: expected a tokenizer saved by functrain or a `tokenizer.json`, came other JSON")
