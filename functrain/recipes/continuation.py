"""A pre-trained model continues a text."""

from __future__ import annotations

import torch

import functrain as ft
from functrain.generate import generate
from functrain.models import gpt2


def continuation(
    params: ft.tree.Params,
    model: gpt2.Config,
    tokenizer: ft.data.Tokenizer,
    prompt: str,
    key: torch.Tensor,
    *,
    tokens: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
) -> str:
    """Return the text that follows the prompt: so many tokens, or less where the document ends.

    Without a prompt the text is that of a new document. Temperature 0 takes the likeliest token each time.
    """
    ids = [int(token) for token in tokenizer.encode(prompt)]
    if not ids:
        if tokenizer.end is None:
            raise ValueError("prompt: expected a text to continue: this tokenizer has no mark for a document's start")
        ids = [tokenizer.end]
    start = torch.tensor([ids], device=key.device)  # (1, T)
    found = generate(
        gpt2, params, start, model, key, steps=tokens, temperature=temperature, top_k=top_k, top_p=top_p
    )  # (1, T + tokens)
    return tokenizer.decode(found[0, len(ids) :]).split(ft.data.END)[0]
