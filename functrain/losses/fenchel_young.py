"""Losses that are made of a maximum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def make_fenchel_young_loss(max_fun: Callable[..., Any]) -> Callable[..., Any]:
    """Make the loss max_fun(scores) - <targets, scores>, whose derivative is that of `max_fun` minus the targets.

    `max_fun` takes a vector to a number, as `lambda s: torch.logsumexp(s, -1)` does; the loss maps it over all leading
    dims, and passes on keyword arguments. With the logsumexp it is the softmax cross entropy minus the targets'
    entropy. Equals `optax.losses.make_fenchel_young_loss`.

    Source: Blondel et al. 2020 (arXiv:1901.02324).

    Shapes of the loss's arguments: scores (..., N), targets broadcast with them; the result is (...).

    >>> loss = ft.losses.make_fenchel_young_loss(lambda scores: torch.logsumexp(scores, -1))
    >>> loss(torch.zeros(2, 4), torch.tensor([1.0, 0.0, 0.0, 0.0]))
    tensor([1.3863, 1.3863])
    """

    def fenchel_young_loss(scores: Tensor, targets: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        def max_of(row: Tensor) -> Tensor:
            return max_fun(row, *args, **kwargs)

        for _ in scores.shape[:-1]:
            max_of = torch.func.vmap(max_of)
        return max_of(scores) - torch.sum(targets * scores, -1)

    return fenchel_young_loss
