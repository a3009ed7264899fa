"""Losses of two classes: a score, and a label of {0, 1} or {-1, 1}, element by element."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from functrain.losses.reduction import Scalar, check_floating, check_same_shape, positive_part


def sigmoid_binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the cross entropy of the sigmoid of each logit and a label in [0, 1].

    Equals `optax.sigmoid_binary_cross_entropy`.

    Shapes: labels broadcast with logits.
    Raises: TypeError for logits that are no floating-point tensor.

    >>> ft.losses.sigmoid_binary_cross_entropy(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0]))
    tensor([0.6931, 2.1269])
    """
    check_floating("sigmoid_binary_cross_entropy", logits=logits)
    labels = labels.to(logits.dtype)
    # log(1 - sigmoid(x)) = logsigmoid(-x), which keeps its bits where the sigmoid is 1
    return -labels * F.logsigmoid(logits) - (1.0 - labels) * F.logsigmoid(-logits)


def sigmoid_focal_loss(logits: Tensor, labels: Tensor, *, alpha: Scalar | None = None, gamma: Scalar = 2.0) -> Tensor:
    """Compute the cross entropy of each logit times (1 - p_t)**gamma, p_t being the probability of the right class.

    Examples that are right already count less. `alpha` weights the positive ones, 1 - alpha the others. Labels may be
    soft; the derivative by one is right strictly between 0 and 1.

    Equals `optax.losses.sigmoid_focal_loss`. Source: Lin et al. 2017 (arXiv:1708.02002), equation 5.

    Shapes: labels broadcast with logits.
    Raises: TypeError for logits that are no floating-point tensor.

    >>> ft.losses.sigmoid_focal_loss(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0]))
    tensor([0.1733, 0.0018])
    """
    check_floating("sigmoid_focal_loss", logits=logits)
    labels = labels.to(logits.dtype)
    # log(1 - p_t) = log((1 - y) p + y (1 - p)), in logarithms: p may be too small for its dtype
    wrong = torch.logaddexp(_weighted(1.0 - labels, F.logsigmoid(logits)), _weighted(labels, F.logsigmoid(-logits)))
    loss = sigmoid_binary_cross_entropy(logits, labels) * torch.exp(gamma * wrong)
    return loss if alpha is None else (alpha * labels + (1.0 - alpha) * (1.0 - labels)) * loss


def _weighted(weight: Tensor, log: Tensor) -> Tensor:
    """Return log(weight * exp(log))."""
    some = weight != 0
    return torch.where(some, torch.log(torch.where(some, weight, 1.0)) + log, -torch.inf)


def hinge_loss(predictor_outputs: Tensor, targets: Tensor) -> Tensor:
    """Compute max(0, 1 - output * target) for targets of -1 and 1.

    Equals `optax.hinge_loss`.

    >>> ft.losses.hinge_loss(torch.tensor([0.5, 2.0, 0.5]), torch.tensor([1.0, 1.0, -1.0]))
    tensor([0.5000, 0.0000, 1.5000])
    """
    return positive_part(1 - predictor_outputs * targets)


def perceptron_loss(predictor_outputs: Tensor, targets: Tensor) -> Tensor:
    """Compute max(0, -output * target) for targets of -1 and 1.

    Equals `optax.perceptron_loss`.

    Raises: ValueError for two shapes.

    >>> ft.losses.perceptron_loss(torch.tensor([0.5, 2.0, 0.5]), torch.tensor([1.0, 1.0, -1.0]))
    tensor([0.0000, 0.0000, 0.5000])
    """
    check_same_shape("perceptron_loss", predictor_outputs=predictor_outputs, targets=targets)
    return positive_part(-predictor_outputs * targets)


def sparsemax_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the sparsemax loss of each logit and a label of 0 or 1: zero once the logit is 1 on the right side.

    Equals `optax.losses.sparsemax_loss`. Source: Blondel et al. 2020 (arXiv:1901.02324), section 4.4.

    >>> ft.losses.sparsemax_loss(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([1, 1, 0]))
    tensor([0.2500, 0.0000, 3.0000])
    """
    wrong = torch.where(labels.bool(), -logits, logits)
    middle = (wrong + 1.0) ** 2 / 4
    return torch.where(wrong <= -1.0, 0.0, torch.where(wrong >= 1.0, wrong, middle))
