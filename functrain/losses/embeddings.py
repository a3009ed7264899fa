"""Losses that pull embeddings of one kind together and push others apart.

B batch, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from functrain.losses.reduction import Scalar, check_floating, positive_part
from functrain.losses.regression import cosine_similarity


def ntxent(embeddings: Tensor, labels: Tensor, temperature: Scalar = 0.07) -> Tensor:
    """Compute the cross entropy of finding one's own kind among all others, averaged over pairs of one label.

    The normalized, temperature-scaled cross entropy of SimCLR. Equals `optax.ntxent`; where all labels are equal the
    gradient is zero, and optax's NaN. Without any pair the result is NaN.

    Source: Chen et al. 2020 (arXiv:2002.05709), equation 1.

    Shapes: embeddings (B, D), labels (B,); the result is ().
    Raises: ValueError for two batch sizes, TypeError for embeddings that are no floating-point tensor.

    >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    >>> near = ft.losses.ntxent(embeddings, torch.tensor([0, 0, 1, 1]), temperature=0.5)
    >>> far = ft.losses.ntxent(embeddings, torch.tensor([0, 1, 0, 1]), temperature=0.5)
    >>> near < far
    tensor(True)
    """
    check_floating("ntxent", embeddings=embeddings)
    if labels.shape[:1] != embeddings.shape[:1]:
        raise ValueError(
            f"ntxent: expected embeddings (B, D) and labels (B,), came {tuple(embeddings.shape)} and "
            f"{tuple(labels.shape)}"
        )
    eps = torch.finfo(embeddings.dtype).eps
    likeness = cosine_similarity(embeddings[None], embeddings[:, None], epsilon=eps) / temperature  # (B, B)
    same = labels[:, None] == labels[None]  # (B, B)
    pairs = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)  # (B, B)
    some = ~same.all(1, keepdim=True)  # (B, 1)
    # a row without others is computed whole and then dropped: the logsumexp of nothing has a NaN gradient
    others = torch.logsumexp(torch.where(~same | ~some, likeness, -torch.inf), 1, keepdim=True)  # (B, 1)
    gap = torch.where(some, others, -torch.inf) - likeness  # (B, B)
    losses = torch.logaddexp(gap, gap.new_zeros(()))  # (B, B)
    return torch.sum(torch.where(pairs, losses, 0.0)) / pairs.sum()


def triplet_margin_loss(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    dim: int = -1,
    norm_degree: Scalar = 2,
    margin: Scalar = 1.0,
    eps: Scalar = 1e-6,
) -> Tensor:
    """Compute max(0, distance to the positive - distance to the negative + margin).

    A distance is (sum |difference|**norm_degree + eps)**(1 / norm_degree). Equals
    `optax.losses.triplet_margin_loss` for an even degree; for an odd one, optax sums differences with their sign,
    which is no norm.

    Source: Balntas et al. 2016, Learning shallow convolutional feature descriptors with triplet losses.

    Shapes: all broadcast to (..., D); the result is (...).
    Raises: TypeError for tensors that are not floating-point ones.

    >>> anchors, positives, negatives = torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]), torch.tensor([[1.5, 0.0]])
    >>> ft.losses.triplet_margin_loss(anchors, positives, negatives)
    tensor([0.5000])
    """
    check_floating("triplet_margin_loss", anchors=anchors, positives=positives, negatives=negatives)

    def distance(other: Tensor) -> Tensor:
        return (torch.sum(torch.abs(anchors - other) ** norm_degree, dim) + eps) ** (1 / norm_degree)

    return positive_part(distance(positives) - distance(negatives) + margin)
