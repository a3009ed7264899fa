"""Cross entropies between logits and a distribution over the classes, and the smoothing of such labels.

N classes, along `dim`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from functrain.losses.reduction import Dim, Scalar, aligned, check_floating, dims_of, log_softmax, total


def softmax_cross_entropy(logits: Tensor, labels: Tensor, dim: Dim | None = -1, where: Tensor | None = None) -> Tensor:
    """Compute the cross entropy of the softmax of `logits` along `dim` and the distribution `labels`.

    Equals `optax.softmax_cross_entropy`. `where` keeps classes or, without `dim` in its shape, examples. A logit of
    -inf gives NaN unless `where` leaves it out; `safe_softmax_cross_entropy` takes one whose label is 0.

    Shapes: labels broadcast with logits; the result is the logits' shape without `dim`.
    Raises: TypeError for logits that are no floating-point tensor.

    >>> logits, labels = torch.zeros(2, 4), torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    >>> ft.losses.softmax_cross_entropy(logits, labels)
    tensor([1.3863, 1.3863])
    """
    check_floating("softmax_cross_entropy", logits=logits)
    kept = aligned(where, logits, dim)
    return -total(labels * log_softmax(logits, dim, kept), dim, kept)


def safe_softmax_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the cross entropy of the softmax of `logits` and the distribution `labels`, with 0 log 0 = 0.

    Equals `optax.safe_softmax_cross_entropy`, but for the derivative by a label of 0 whose logit is -inf: it is
    infinite, and 0 here.

    Shapes: logits (..., N), labels broadcast with them; the result is (...).
    Raises: TypeError for logits that are no floating-point tensor.

    >>> ft.losses.safe_softmax_cross_entropy(torch.tensor([0.0, 0.0, -torch.inf]), torch.tensor([0.5, 0.5, 0.0]))
    tensor(0.6931)
    """
    check_floating("safe_softmax_cross_entropy", logits=logits)
    logs = log_softmax(logits, -1)  # (..., N)
    impossible = (labels == 0) & (logs == -torch.inf)  # (..., N)
    return -torch.sum(labels * torch.where(impossible, 0.0, logs), -1)


def poly_loss_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    epsilon: Scalar = 2.0,
    dim: Dim | None = -1,
    where: Tensor | None = None,
) -> Tensor:
    """Compute the softmax cross entropy plus epsilon * (1 - p_t), p_t being the probability of the label.

    Equals `optax.losses.poly_loss_cross_entropy`. Source: Leng et al. 2022 (arXiv:2204.12511).

    Shapes: labels broadcast with logits; the result is the logits' shape without `dim`.
    Raises: TypeError for logits or labels that are no floating-point tensors.

    >>> ft.losses.poly_loss_cross_entropy(torch.zeros(1, 4), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    tensor([2.8863])
    """
    check_floating("poly_loss_cross_entropy", logits=logits, labels=labels)
    kept = aligned(where, logits, dim)
    logs = log_softmax(logits, dim, kept)
    return total(labels * (epsilon * (1 - torch.exp(logs)) - logs), dim, kept)


def smooth_labels(labels: Tensor, alpha: Scalar, *, dim: Dim | None = -1, where: Tensor | None = None) -> Tensor:
    """Return (1 - alpha) * labels + alpha / classes: labels that are less sure.

    Equals `optax.smooth_labels`. With `where`, classes are those that it keeps.

    Shapes: labels (..., N); the result is like labels.
    Raises: TypeError for labels that are no floating-point tensor.

    >>> ft.losses.smooth_labels(torch.tensor([0.0, 1.0]), alpha=0.1)
    tensor([0.0500, 0.9500])
    """
    check_floating("smooth_labels", labels=labels)
    classes: Scalar
    if where is None:
        classes = math.prod(labels.shape[d] for d in dims_of(labels, dim))
    else:
        classes = torch.sum(where.to(labels.dtype), dims_of(where, dim), keepdim=True)
    return (1.0 - alpha) * labels + alpha / classes
