"""Special tokens: what each is for, told by the files of a tokenizer's folder or by the usual names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from functrain.data.text import END

Roles: TypeAlias = Mapping[str, str | None]  # "mask_token": "[MASK]" and so on, as in tokenizer_config.json


class SpecialTokens(NamedTuple):
    """The ids of a vocabulary that are no text, by what they are for; None where there is no such token."""

    cls: int | None = None  # before a row whose first output stands for the whole
    sep: int | None = None  # after each part of a row
    pad: int | None = None  # fills a row
    mask: int | None = None  # stands where a token is to be found
    begin: int | None = None  # before a document
    end: int | None = None  # after a document
    unknown: int | None = None  # for text that the vocabulary has no tokens for
    ids: tuple[int, ...] = ()  # all special tokens, ascending: those above and others


KEYS = {
    "cls": "cls_token", "sep": "sep_token", "pad": "pad_token", "mask": "mask_token", "begin": "bos_token",
    "end": "eos_token", "unknown": "unk_token",
}  # fmt: skip
_USUAL = {
    "cls": ("[CLS]",),
    "sep": ("[SEP]",),
    "pad": ("[PAD]", "<pad>", "<|pad|>"),
    "mask": ("[MASK]", "<mask>"),
    "begin": ("<s>", "<bos>", "[BOS]", "<|begin_of_text|>"),
    "end": (END, "</s>", "<eos>", "[EOS]", "<|end_of_text|>", "<|endoftext|>"),
    "unknown": ("[UNK]", "<unk>"),
}


def roles_of(folder: Path) -> Roles:
    """Read what `tokenizer_config.json` and `special_tokens_map.json` of a folder say of special tokens.

    Raises: ValueError naming the file that is no JSON object, or the field that names no token.
    """
    found: dict[str, str | None] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if not (path := folder / name).is_file():
            continue
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: expected JSON, came something else ({error})") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path}: expected a JSON object, came {type(content).__name__}")
        found |= {key: _token(path, key, content[key]) for key in KEYS.values() if key in content}
    return found


def special_tokens(
    added: list[Any], roles: Roles, id_of: Callable[[str], int | None], where: str = "Subwords"
) -> SpecialTokens:
    """Tell the special tokens of `added_tokens` of a `tokenizer.json`: by `roles`, and those left by the usual names.

    Raises: ValueError for a role whose token is not in the vocabulary.
    """
    special = {token["content"]: int(token["id"]) for token in added if token.get("special")}
    found: dict[str, int | None] = {}
    for name, key in KEYS.items():
        content = roles.get(key)
        if content is not None and id_of(content) is None:
            raise ValueError(
                f"{where}: {key} is {content!r}, which is not in the vocabulary of tokenizer.json; take the field out, "
                "or a tokenizer.json that has the token"
            )
        if content is None and key not in roles:
            content = next((usual for usual in _USUAL[name] if usual in special), None)
        found[name] = None if content is None else id_of(content)
    if "<mask>" in special:  # RoBERTa's names: one pair of tokens is around a document and a row
        found["cls"] = found["begin"] if found["cls"] is None and KEYS["cls"] not in roles else found["cls"]
        found["sep"] = found["end"] if found["sep"] is None and KEYS["sep"] not in roles else found["sep"]
    ids = {*special.values(), *(id for id in found.values() if id is not None)}
    return SpecialTokens(**found, ids=tuple(sorted(ids)))


def _token(path: Path, key: str, value: Any) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    if content is not None and not isinstance(content, str):
        raise ValueError(f"{path}: expected {key} to be a token or null, came {value!r}")
    return content
