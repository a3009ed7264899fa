"""Positions of tokens in rows of padding or of several documents. B batch, T tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def positions_of(tokens: Tensor, documents: Tensor | None, mask: Tensor | None) -> Tensor:
    """Count tokens from the beginning of each document, (B, T), or past the padding of each row; of plain rows (T,).

    >>> from functrain.models import positions
    >>> positions.positions_of(torch.zeros(1, 5).long(), torch.tensor([[7, 7, 7, 4, 4]]), None)
    tensor([[0, 1, 2, 0, 1]])
    """
    places = torch.arange(tokens.shape[1], device=tokens.device)
    if mask is not None and documents is None:
        return (torch.cumsum(mask.long(), 1) - 1).clamp(min=0)
    if documents is None:
        return places  # as all rows have it
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins = torch.cat([begins[:, :1], documents[:, 1:] != documents[:, :-1]], 1)  # (B, T)
    return places - torch.cummax(torch.where(begins, places, 0), 1).values
