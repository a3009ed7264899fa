"""Losses of the order that scores give to a list.

L items of a list.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrain.losses.reduction import check_floating, log_softmax, total


def ranking_softmax_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    where: Tensor | None = None,
    weights: Tensor | None = None,
    reduce_fn: Callable[..., Any] | None = torch.mean,
) -> Tensor:
    """Compute the cross entropy of the softmax of a list's scores and the relevance labels of its items.

    `where` keeps items, `weights` multiply labels. `reduce_fn` is `torch.mean`, `torch.sum`, None for a loss per list,
    or a function of `(losses, where=lists that keep an item)`; the mean over no list is 0.

    Equals `optax.losses.ranking_softmax_loss`.

    Shapes: all (..., L); the result is (), or (...) without a reduction.
    Raises: TypeError for logits that are no floating-point tensor.

    >>> ft.losses.ranking_softmax_loss(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
    tensor(0.1698)
    >>> ft.losses.ranking_softmax_loss(torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
    tensor(3.1698)
    """
    check_floating("ranking_softmax_loss", logits=logits)
    labels = labels.to(logits.dtype)
    kept = None if where is None else where.bool()
    labels = labels if weights is None else labels * weights
    losses = -total(labels * log_softmax(logits, -1, kept), -1, kept)  # (...)
    lists = None if kept is None else kept.any(-1)  # (...)
    if reduce_fn is None:
        return losses if lists is None else torch.where(lists, losses, 0.0)
    if reduce_fn is torch.sum:
        return total(losses, None, lists)
    if reduce_fn is not torch.mean:
        return reduce_fn(losses, where=lists)
    if lists is None:
        return torch.mean(losses)
    return total(losses, None, lists) / torch.clamp(lists.sum(), min=1)
