"""Which keys a query sees, as boolean masks.

B batch, T tokens, S keys.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_mask(
    tokens: int,
    *,
    causal: bool = False,
    window: int | None = None,
    documents: Tensor | None = None,
    key_mask: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the mask of `attention` for the same arguments: true where a query sees a key, (T, T) or (B, 1, T, T).

    With `key_mask` alone it is (B, 1, 1, S), of any number of queries. On the device of the tensors given, else on
    `device`.
    Raises: ValueError for nothing to make a mask of, a window below 1, and tensors of another shape; TypeError for a
    key_mask that is not boolean and for documents that are no integers.

    >>> ft.nn.attention_mask(3, causal=True, window=2)
    tensor([[ True, False, False],
            [ True,  True, False],
            [False,  True,  True]])
    >>> ft.nn.attention_mask(3, causal=True, documents=torch.tensor([[7, 7, 4]]))[0, 0]
    tensor([[ True, False, False],
            [ True,  True, False],
            [False, False,  True]])
    """
    check_mask(tokens, window=window, documents=documents, key_mask=key_mask)
    given = next((t for t in (documents, key_mask) if t is not None), None)
    device = device if given is None else given.device
    mask: Tensor | None = None
    if causal or window is not None:
        places = torch.arange(tokens, device=device)
        ahead = places - places[:, None]  # (T, T): how far the key lies ahead of the query
        if window is None:
            mask = ahead <= 0
        else:
            mask = (ahead <= 0) & (ahead > -window) if causal else ahead.abs() < window
    for more in (
        None if documents is None else documents[..., None, :, None] == documents[..., None, None, :],  # (B, 1, T, T)
        None if key_mask is None else key_mask[..., None, None, :],  # (B, 1, 1, S)
    ):
        if more is not None:
            mask = more if mask is None else mask & more
    if mask is None:
        raise ValueError("attention_mask: expected causal, window, documents or key_mask, came none; then leave it out")
    return mask


def causal_mask(queries: int, device: torch.device | str | None = None) -> Tensor:
    """Return the mask by which query t sees keys 0 to t, (T, T), boolean.

    >>> ft.nn.causal_mask(3)
    tensor([[ True, False, False],
            [ True,  True, False],
            [ True,  True,  True]])
    """
    return torch.ones(queries, queries, dtype=torch.bool, device=device).tril()


def check_mask(
    tokens: int, *, window: int | None = None, documents: Tensor | None = None, key_mask: Tensor | None = None
) -> None:
    """Raise as `attention_mask` does for what does not fit."""
    if window is not None and window < 1:
        raise ValueError(f"attention: expected a window of at least 1, a query's own place, came {window}")
    for name, given in (("documents", documents), ("key_mask", key_mask)):
        if given is None:
            continue
        if given.dim() != 2 or (name == "documents" and given.shape[-1] != tokens):
            expected = f"(B, {tokens})" if name == "documents" else "(B, S)"
            raise ValueError(f"attention: expected {name} {expected}, came {tuple(given.shape)}")
    if key_mask is not None and key_mask.dtype != torch.bool:
        raise TypeError(
            f"attention: expected a boolean key_mask, true where a key is no padding, came {key_mask.dtype}; "
            "pass key_mask.bool()"
        )
    if documents is not None and (documents.is_floating_point() or documents.dtype == torch.bool):
        raise TypeError(f"attention: expected documents of integers, came {documents.dtype}; pass documents.long()")
