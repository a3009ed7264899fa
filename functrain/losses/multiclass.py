"""Losses of the scores of several classes and one integer label.

N classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from functrain.losses.cross_entropy import gathered
from functrain.losses.reduction import check_integer, one_hot


def multiclass_hinge_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Compute the largest score, all but the label's raised by 1, minus the label's score.

    Equals `optax.losses.multiclass_hinge_loss`.

    Shapes: scores (..., N), labels and the result (...).

    >>> ft.losses.multiclass_hinge_loss(torch.tensor([[2.0, 0.0, 0.5], [2.0, 0.0, 0.5]]), torch.tensor([0, 2]))
    tensor([0.0000, 2.5000])
    """
    right = one_hot(labels, scores.shape[-1], scores.dtype)  # (..., N)
    return torch.amax(scores + 1.0 - right, -1) - torch.sum(scores * right, -1)


def multiclass_perceptron_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Compute the largest score minus the label's score.

    Equals `optax.losses.multiclass_perceptron_loss`.

    Shapes: scores (..., N), labels and the result (...).

    >>> ft.losses.multiclass_perceptron_loss(torch.tensor([[2.0, 0.0, 0.5], [2.0, 0.0, 0.5]]), torch.tensor([0, 2]))
    tensor([0.0000, 1.5000])
    """
    right = one_hot(labels, scores.shape[-1], scores.dtype)  # (..., N)
    return torch.amax(scores, -1) - torch.sum(scores * right, -1)


def multiclass_sparsemax_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Compute the sparsemax loss, whose derivative by the scores is `sparsemax(scores)` minus the one-hot label.

    Equals `optax.losses.multiclass_sparsemax_loss`. Source: Martins and Astudillo 2016 (arXiv:1602.02068).

    Shapes: scores (..., N), labels and the result (...).
    Raises: TypeError for labels that are no integers.

    >>> ft.losses.multiclass_sparsemax_loss(torch.tensor([[2.0, 0.0, 0.5], [2.0, 0.0, 0.5]]), torch.tensor([0, 2]))
    tensor([0.0000, 1.5000])
    """
    check_integer("multiclass_sparsemax_loss", labels=labels)
    p = sparsemax(scores)  # (..., N)
    own = gathered("multiclass_sparsemax_loss", scores, labels.long(), "before")  # (...)
    above = scores - own.unsqueeze(-1)  # (..., N)
    # where the probability is 0 the score may be -inf
    return torch.sum(p * torch.where(p > 0, above, 0.0), -1) + 0.5 * (1.0 - torch.sum(p * p, -1))


def sparsemax(scores: Tensor) -> Tensor:
    """Compute the probabilities nearest to the scores, many of them exactly zero: max(scores - threshold, 0).

    The Euclidean projection of each row onto the probability simplex.

    Source: Martins and Astudillo 2016 (arXiv:1602.02068), algorithm 1 and proposition 1.

    Shapes: scores and the result (..., N).

    >>> ft.losses.sparsemax(torch.tensor([1.0, 0.5, -1.0]))
    tensor([0.7500, 0.2500, 0.0000])
    """
    # probabilities do not change when all scores do by one number: sums near 0 keep their bits
    scores = scores - torch.amax(scores, -1, keepdim=True).detach()  # (..., N)
    sorted_scores = torch.sort(scores.detach(), -1, descending=True).values  # (..., N)
    sums = torch.cumsum(sorted_scores, -1)  # (..., N)
    ranks = torch.arange(1, scores.shape[-1] + 1, dtype=scores.dtype, device=scores.device)  # (N,)
    kept = torch.sum(1 + ranks * sorted_scores > sums, -1, keepdim=True)  # (..., 1)
    threshold = (sums.gather(-1, kept - 1) - 1) / kept  # (..., 1)
    # Once more from the scores themselves, so that the derivative is that of the sum over the support.
    support = scores.detach() > threshold  # (..., N)
    threshold = (torch.sum(torch.where(support, scores, 0.0), -1, keepdim=True) - 1) / support.sum(-1, keepdim=True)
    return torch.where(support, torch.relu(scores - threshold), 0.0)
