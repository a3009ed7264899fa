"""The loss that keeps a router from sending all tokens to few experts.

E experts; ... any dims of tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from functrain.losses.loss import Loss


class ExpertLoad(NamedTuple):
    """What routers sent where, as sums over real tokens, and over layers where several are added."""

    chosen: Tensor  # (E,), float32: tokens that each expert got
    probability: Tensor  # (E,), float32: sum of the probabilities that the router gave it
    tokens: Tensor  # (), float32: how many


def expert_load(probabilities: Tensor, experts: Tensor, mask: Tensor | None = None) -> ExpertLoad:
    """Add up a router's probabilities and the experts that it chose, over the tokens that the mask keeps.

    Padding is to have no say: leave it out by the mask. Only the probabilities have a gradient.

    Shapes: probabilities (..., E), experts (..., K), mask (...).
    Raises: ValueError for a mask of another shape.

    >>> probabilities = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.0, 1.0]])
    >>> experts = torch.tensor([[0], [0], [1]])
    >>> ft.losses.expert_load(probabilities, experts, torch.tensor([True, True, False]))
    ExpertLoad(chosen=tensor([2., 0.]), probability=tensor([1.2500, 0.7500]), tokens=tensor(2.))
    """
    rows = probabilities.reshape(-1, probabilities.shape[-1]).float()  # (N, E)
    if mask is not None and mask.shape != probabilities.shape[:-1]:
        expected, came = tuple(probabilities.shape[:-1]), tuple(mask.shape)
        raise ValueError(f"expert_load: expected a mask of the tokens {expected}, came {came}")
    weights = rows.new_ones(rows.shape[0]) if mask is None else mask.reshape(-1).to(rows.dtype)  # (N,)
    numbers = torch.arange(rows.shape[-1], device=rows.device)
    sent = torch.sum(experts.reshape(rows.shape[0], -1, 1) == numbers, 1).to(rows.dtype)  # (N, E)
    return ExpertLoad(weights @ sent, weights @ rows, torch.sum(weights))


def load_balancing(load: ExpertLoad) -> Loss:
    """Compute E times the sum over experts of the share of tokens that each got and of its mean probability.

    It is at least the number of experts a token has, and that where all have the same. The weight is the number of
    tokens; parts of a batch are balanced each for itself, so their sum is not the loss of the whole. Equals
    `load_balancing_loss_func` of transformers, with its `attention_mask`.

    Source: Fedus et al. 2021 (arXiv:2101.03961), equations 4 to 6.

    >>> even = ft.losses.ExpertLoad(torch.tensor([2.0, 2.0]), torch.tensor([2.0, 2.0]), torch.tensor(4.0))
    >>> ft.losses.load_balancing(even).total / 4
    tensor(1.)
    """
    tokens = load.tokens.clamp(min=1.0)  # of none, 0
    mean = torch.sum(load.chosen / tokens * (load.probability / tokens)) * load.chosen.shape[-1]
    return Loss(mean * load.tokens, load.tokens, {})
