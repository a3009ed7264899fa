"""Overlap of predicted and true segments.

C classes along the last dim, B batch along the first; what is between them is space.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from functrain.losses.reduction import Dim, Scalar, check_same_shape, total

Reduction = Literal["mean", "sum", "none"]


def dice_loss(
    predictions: Tensor,
    targets: Tensor,
    *,
    class_weights: Tensor | None = None,
    smooth: Scalar = 1.0,
    alpha: Scalar = 0.5,
    beta: Scalar = 0.5,
    apply_softmax: bool = True,
    reduction: Reduction = "mean",
    ignore_background: bool = False,
    dim: Dim | None = None,
) -> Tensor:
    """Compute 1 - (hits + smooth) / (hits + alpha * false positives + beta * misses + smooth), for each class.

    With alpha = beta = 1/2 it is the Dice loss, else Tversky's. One class means a sigmoid, several a softmax; without
    `apply_softmax` the predictions are probabilities, which is not checked: a step would have to wait for the answer.
    `dim` is summed over, all of space when it is None; `reduction` is over the classes, without the first one with
    `ignore_background`.

    Equals `optax.losses.dice_loss`. Source: Milletari et al. 2016 (arXiv:1606.04797).

    Shapes: predictions and targets (B, ..., C), or one of them without C = 1; class_weights (C,); the result is (B,),
    (B, C) without reduction.
    Raises: ValueError for two shapes and for another reduction.

    >>> probabilities = torch.tensor([[[0.9, 0.1], [0.2, 0.8]]])  # (B, pixels, C)
    >>> targets = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> ft.losses.dice_loss(probabilities, targets, apply_softmax=False)
    tensor([0.0750])
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"dice_loss: expected a reduction 'mean', 'sum' or 'none', came {reduction!r}")
    predictions = predictions.unsqueeze(-1) if predictions.ndim == targets.ndim - 1 else predictions
    targets = targets.unsqueeze(-1) if targets.ndim == predictions.ndim - 1 else targets
    check_same_shape("dice_loss", predictions=predictions, targets=targets)
    classes = predictions.shape[-1]
    if class_weights is not None and class_weights.shape != (classes,):
        raise ValueError(f"dice_loss: expected class_weights ({classes},), came {tuple(class_weights.shape)}")
    p = predictions
    if apply_softmax:
        p = torch.sigmoid(p) if classes == 1 else torch.softmax(p, -1)
    t = targets.to(p.dtype)
    dims = tuple(range(1, p.ndim - 1)) if dim is None else dim
    hits, predicted, true = total(p * t, dims), total(p, dims), total(t, dims)  # (B, C)
    mistakes = alpha * (predicted - hits) + beta * (true - hits)
    losses = 1.0 - (hits + smooth) / (hits + mistakes + smooth)
    losses = losses if class_weights is None else losses * class_weights
    losses = losses[..., 1:] if ignore_background and classes > 1 else losses
    if reduction == "none":
        return losses
    return losses.mean(-1) if reduction == "mean" else losses.sum(-1)


def multiclass_generalized_dice_loss(
    predictions: Tensor,
    targets: Tensor,
    *,
    smooth: Scalar = 1.0,
    apply_softmax: bool = True,
    ignore_background: bool = False,
) -> Tensor:
    """Compute the mean Dice loss with classes weighted by one over their squared frequency in the targets.

    Equals `optax.losses.multiclass_generalized_dice_loss`. Source: Sudre et al. 2017 (arXiv:1707.03237).

    Shapes: predictions and targets (B, ..., C); the result is ().
    Raises: ValueError for two shapes.

    >>> probabilities = torch.tensor([[[0.9, 0.1], [0.2, 0.8]]])  # (B, pixels, C)
    >>> targets = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> ft.losses.multiclass_generalized_dice_loss(probabilities, targets, apply_softmax=False)
    tensor(0.0750)
    """
    check_same_shape("multiclass_generalized_dice_loss", predictions=predictions, targets=targets)
    t = targets.to(predictions.dtype)
    frequencies = torch.sum(t.flatten(0, -2), 0)  # (C,)
    weights = 1.0 / (frequencies**2 + 1e-7)
    weights = weights / weights.sum() * len(weights)
    return dice_loss(
        predictions,
        t,
        class_weights=weights,
        smooth=smooth,
        apply_softmax=apply_softmax,
        reduction="none",
        ignore_background=ignore_background,
    ).mean()


def binary_dice_loss(
    predictions: Tensor, targets: Tensor, *, smooth: Scalar = 1.0, apply_sigmoid: bool = True
) -> Tensor:
    """Compute `dice_loss` of one class.

    Equals `optax.losses.binary_dice_loss`, which without `apply_sigmoid` refuses all probabilities but 1.

    Shapes: predictions and targets (B, ...) or (B, ..., 1); the result is (B,).
    Raises: ValueError for two shapes.

    >>> ft.losses.binary_dice_loss(torch.tensor([[4.0, -4.0]]), torch.tensor([[1.0, 0.0]]))
    tensor([0.0090])
    """
    if predictions.ndim == targets.ndim and predictions.shape[-1] != 1:
        predictions, targets = predictions.unsqueeze(-1), targets.unsqueeze(-1)
    return dice_loss(predictions, targets, smooth=smooth, apply_softmax=apply_sigmoid)
