"""How far a predicted distribution is from the true one."""

from __future__ import annotations

import torch
from torch import Tensor

from functrain.losses.reduction import Dim, check_floating, total


def kl_divergence(
    log_predictions: Tensor, targets: Tensor, dim: Dim | None = -1, where: Tensor | None = None
) -> Tensor:
    """Compute the sum over `dim` of targets * (log targets - log predictions), with 0 log 0 = 0.

    Equals `optax.kl_divergence`. The derivative by a target of 0 is -log_prediction, where optax has NaN.

    Shapes: both broadcast; the result is their shape without `dim`.
    Raises: TypeError for tensors that are not floating-point ones.

    >>> predictions, targets = torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])
    >>> ft.losses.kl_divergence(torch.log(predictions), targets)
    tensor(0.6931)
    """
    check_floating("kl_divergence", log_predictions=log_predictions, targets=targets)
    none = targets == 0
    logs = torch.where(none, 0.0, torch.log(torch.where(none, 1.0, targets)))
    return total(targets * (logs - log_predictions), dim, where)


def kl_divergence_with_log_targets(
    log_predictions: Tensor, log_targets: Tensor, dim: Dim | None = -1, where: Tensor | None = None
) -> Tensor:
    """Compute `kl_divergence` of targets that come as logarithms.

    Equals `optax.losses.kl_divergence_with_log_targets`.

    Shapes: both broadcast; the result is their shape without `dim`.
    Raises: TypeError for tensors that are not floating-point ones.

    >>> predictions, targets = torch.tensor([0.5, 0.5]), torch.tensor([0.75, 0.25])
    >>> ft.losses.kl_divergence_with_log_targets(torch.log(predictions), torch.log(targets))
    tensor(0.1308)
    """
    check_floating("kl_divergence_with_log_targets", log_predictions=log_predictions, log_targets=log_targets)
    return total(torch.exp(log_targets) * (log_targets - log_predictions), dim, where)


def generalized_kl_divergence(
    log_predictions: Tensor, targets: Tensor, dim: Dim | None = -1, where: Tensor | None = None
) -> Tensor:
    """Compute `kl_divergence` plus the sum of predictions - targets: for positive numbers that need not sum to 1.

    Equals `optax.losses.generalized_kl_divergence`. Source: Boyd and Vandenberghe 2004, Convex Optimization, page 90.

    Shapes: both broadcast; the result is their shape without `dim`.
    Raises: TypeError for tensors that are not floating-point ones.

    >>> predictions, targets = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0])
    >>> ft.losses.generalized_kl_divergence(torch.log(predictions), targets)
    tensor(0.3069)
    """
    divergence = kl_divergence(log_predictions, targets, dim, where)
    return divergence + total(torch.exp(log_predictions) - targets, dim, where)


convex_kl_divergence = generalized_kl_divergence  # optax's older name
