"""What a BERT is trained on, as sums over rows or real targets.

B batch, T tokens, V vocabulary, N labels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from functrain import losses
from functrain.losses import Loss


def token_weights(mask: Tensor) -> Tensor:
    """Return weights of masked tokens that add up to the rows of the batch, float32: mask * B / sum(mask).

    They are what `pretraining_loss` takes. Make them of a whole batch, before a step cuts it into parts.
    Raises: TypeError for a mask that is not boolean.

    >>> ft.models.bert.token_weights(torch.tensor([[True, False, False], [True, True, True]]))
    tensor([[0.5000, 0.0000, 0.0000],
            [0.5000, 0.5000, 0.5000]])
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"token_weights: expected a boolean mask, true at masked tokens, came {mask.dtype}")
    weights = mask.to(torch.float32)
    # a batch in which nothing is masked has weights of zero, and no NaN
    return weights * (mask.shape[0] / torch.sum(weights).clamp(min=1.0))


def pretraining_loss(
    predictions: tuple[Tensor, Tensor], targets: Tensor, weights: Tensor, next_sentence: Tensor
) -> Loss:
    """Sum the cross entropies of masked tokens, times their weights, and of whether the second sentence follows.

    Divided by its weight, the number of rows, it is the mean over masked tokens plus the mean over rows, as in the
    paper, if the weights are those of `token_weights`; then parts of a batch with unequal numbers of masked tokens add
    up to the whole one. Where a weight is zero the target may be any integer. Metrics are loss and accuracy of both.

    Shapes: `predictions` of the head "pretraining", (B, T, V) and (B, 2); targets and weights (B, T); next_sentence
    (B,), 0 where the second sentence follows the first.
    Raises: TypeError for weights that are a mask, with which each part of a batch would count by its own mean;
    ValueError and IndexError as `ft.losses.classification`.

    >>> predictions = ft.models.bert.Predictions(torch.zeros(2, 3, 4), torch.zeros(2, 2))
    >>> weights = ft.models.bert.token_weights(torch.tensor([[True, False, False], [True, True, True]]))
    >>> loss = ft.models.bert.pretraining_loss(predictions, torch.ones(2, 3).long(), weights, torch.tensor([0, 1]))
    >>> loss.total / loss.weight  # log(4) + log(2)
    tensor(2.0794)
    """
    if not weights.is_floating_point():
        raise TypeError(
            f"pretraining_loss: expected weights that add up to the rows, came {weights.dtype}; pass "
            "token_weights(mask) of the whole batch"
        )
    tokens = losses.classification(predictions[0], targets, weights)
    rows = losses.classification(predictions[1], next_sentence)
    metrics = {
        "masked_lm_loss": tokens.total.detach(),
        "masked_lm_accuracy": tokens.metrics["accuracy"],
        "next_sentence_loss": rows.total.detach(),
        "next_sentence_accuracy": rows.metrics["accuracy"],
    }
    return Loss(tokens.total + rows.total, rows.weight, metrics)


def classifier_loss(logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Loss:
    """Sum the loss of the heads "sequence" and "token" over real labels: squared errors of one label, a regression, and
    else cross entropies, with the metric "accuracy".

    Shapes: logits (..., N); labels (...), floating-point for one label, else integers; mask (...), true at real ones.
    Raises: TypeError for labels of the other kind; ValueError and IndexError as `ft.losses.classification`.

    >>> loss = ft.models.bert.classifier_loss(torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 5.0]))
    >>> loss.total / loss.weight
    tensor(4.5000)
    """
    if logits.shape[-1] > 1:
        return losses.classification(logits, labels, mask)
    if not labels.is_floating_point():
        raise TypeError(
            f"classifier_loss: expected floating-point labels for the one label of a regression, came {labels.dtype}; "
            "pass labels.float(), or num_labels=2 for two classes"
        )
    if labels.shape != logits.shape[:-1] or (mask is not None and mask.shape != labels.shape):
        came = f"{tuple(labels.shape)}" + ("" if mask is None else f" and mask {tuple(mask.shape)}")
        raise ValueError(f"classifier_loss: expected labels {tuple(logits.shape[:-1])} as the logits, came {came}")
    errors = losses.squared_error(logits[..., 0], labels)
    weights = torch.ones_like(errors) if mask is None else mask.to(errors.dtype)
    return Loss(torch.sum(torch.where(weights != 0, errors, 0.0) * weights), torch.sum(weights), {})
