"""A pre-trained model continues a text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import functrain as ft
from functrain.generation import decode_stream
from functrain.recipes.architectures import ARCHITECTURES, Architecture


def continuation(
    architecture: Architecture,
    params: ft.tree.Params,
    model: Any,
    tokenizer: ft.data.Tokenizer,
    prompt: str,
    key: torch.Tensor,
    *,
    tokens: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    end: int | None = None,
) -> Iterator[str]:
    """Give the text that follows the prompt as it comes: so many tokens, or less where the document ends.

    `end` is the token of that end, the tokenizer's own if it is left out. Without a prompt the text is that of a new
    document. Temperature 0 takes the likeliest token each time.

    Raises: at the call, ValueError for an architecture that generates nothing, for an empty prompt without an `end`,
    and what `generate` raises.
    """
    if not architecture.generates:
        others = " and ".join(name for name, found in ARCHITECTURES.items() if found.generates)
        raise ValueError(f"generate: a {architecture.name} continues no text; expected a model of {others}")
    end = tokenizer.end if end is None else end
    ids = [int(token) for token in tokenizer.encode(prompt)]
    if not ids:
        if end is None:
            raise ValueError("prompt: expected a text to continue: this tokenizer has no mark for a document's start")
        ids = [end]
    start = torch.tensor([ids], device=key.device)  # (1, T)
    found = ft.generation.stream(
        architecture.module, params, start, model, key, steps=tokens, temperature=temperature, top_k=top_k, top_p=top_p
    )
    return _document(decode_stream(tokenizer, _until(found, end)))


def _until(found: Iterator[torch.Tensor], end: int | None) -> Iterator[int]:
    for chosen in found:
        token = int(chosen)
        if token == end:
            return
        yield token


def _document(pieces: Iterator[str]) -> Iterator[str]:
    for piece in pieces:
        # merged bytes may spell the character too that is the end's
        text, mark, _ = piece.partition(ft.data.END)
        yield text
        if mark:
            return
