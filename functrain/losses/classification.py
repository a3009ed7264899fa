"""The loss of a classifier, and how often it is right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from functrain.losses.cross_entropy import check_shapes, gathered, legal, total_of, weights_of, wide
from functrain.losses.loss import Loss


def classification(logits: Tensor, labels: Tensor, mask: Tensor | None = None, *, label_smoothing: float = 0.0) -> Loss:
    """Sum the cross entropy of every example, times its mask; the metric "accuracy" is how many are right.

    With `label_smoothing`, that part of the probability is spread over all classes. Equals
    `torch.nn.functional.cross_entropy(..., reduction="sum")` of the examples whose mask is 1, in float32 for
    half-precision logits. Where the mask is zero the label may be any integer.

    Shapes: logits (B, C), or (..., C); labels and mask (B,), or (...).
    Raises: ValueError for other shapes, or a smoothing outside [0, 1); TypeError for labels that are no integers;
    IndexError for a label that is no class where the mask is not zero, on the CPU.

    >>> loss = ft.losses.classification(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
    >>> loss.total / loss.weight, loss.metrics["accuracy"] / loss.weight
    (tensor(0.7201), tensor(0.5000))
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"classification: expected label_smoothing in [0, 1), came {label_smoothing}")
    check_shapes("classification", "logits", logits, labels, mask)
    weights = weights_of(logits, labels, mask)  # (B,)
    there = legal(labels, mask)
    logs = F.log_softmax(wide(logits), -1)  # (B, C)
    losses = -gathered("classification", logs, there, "by mask=")  # (B,)
    if label_smoothing:
        losses = (1.0 - label_smoothing) * losses - label_smoothing * logs.mean(-1)
    right = (torch.argmax(logits, -1) == there).to(weights.dtype)
    return Loss(torch.sum(losses * weights), total_of(weights, mask), {"accuracy": torch.sum(right * weights)})
