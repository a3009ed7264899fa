"""Losses between numbers, element by element, and the angle between vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from functrain.losses.reduction import Dim, Scalar, check_floating, check_same_shape, total


def squared_error(predictions: Tensor, targets: Tensor | None = None) -> Tensor:
    """Compute (predictions - targets)**2; without targets they are zeros.

    Equals `optax.squared_error`, and twice `l2_loss`.

    Raises: TypeError for predictions that are no floating-point tensor, ValueError for two shapes.

    >>> ft.losses.squared_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]))
    tensor([0., 4.])
    """
    check_floating("squared_error", predictions=predictions)
    if targets is not None:
        check_same_shape("squared_error", predictions=predictions, targets=targets)
    return _errors(predictions, targets) ** 2


def l2_loss(predictions: Tensor, targets: Tensor | None = None) -> Tensor:
    """Compute (predictions - targets)**2 / 2; without targets they are zeros.

    Equals `optax.l2_loss`.

    Raises: TypeError for predictions that are no floating-point tensor, ValueError for two shapes.

    >>> ft.losses.l2_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]))
    tensor([0., 2.])
    """
    return 0.5 * squared_error(predictions, targets)


def huber_loss(predictions: Tensor, targets: Tensor | None = None, *, delta: Scalar = 1.0) -> Tensor:
    """Compute error**2 / 2 where |error| is at most delta, and its tangent beyond.

    Its derivative is the error clipped to [-delta, delta]. Equals `optax.huber_loss`.

    Raises: TypeError for predictions that are no floating-point tensor.

    >>> ft.losses.huber_loss(torch.tensor([0.5, 3.0]), torch.zeros(2), delta=1.0)
    tensor([0.1250, 2.5000])
    """
    check_floating("huber_loss", predictions=predictions)
    size = torch.abs(_errors(predictions, targets))
    quadratic = torch.minimum(size, delta) if isinstance(delta, Tensor) else torch.clamp(size, max=delta)
    return 0.5 * quadratic**2 + delta * (size - quadratic)


def log_cosh(predictions: Tensor, targets: Tensor | None = None) -> Tensor:
    """Compute log(cosh(error)): about error**2 / 2 near 0, and |error| - log 2 far from it.

    Equals `optax.log_cosh`.

    Raises: TypeError for predictions that are no floating-point tensor.

    >>> ft.losses.log_cosh(torch.tensor([0.5, 3.0]))
    tensor([0.1201, 2.3093])
    """
    check_floating("log_cosh", predictions=predictions)
    errors = _errors(predictions, targets)
    return torch.logaddexp(errors, -errors) - math.log(2.0)


def cosine_similarity(
    predictions: Tensor,
    targets: Tensor,
    *,
    epsilon: Scalar = 0.0,
    dim: Dim | None = -1,
    where: Tensor | None = None,
) -> Tensor:
    """Compute the cosine of the angle between two vectors along `dim`, of the elements that `where` keeps.

    `epsilon` is the least square of a norm in the denominator; with 0, a vector of zeros has NaN.
    Equals `optax.cosine_similarity`.

    Shapes: both broadcast; the result is their shape without `dim`.
    Raises: TypeError for tensors that are not floating-point ones.

    >>> ft.losses.cosine_similarity(torch.tensor([1.0, 0.0]), torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]]))
    tensor([1.0000, 0.0000, 0.7071])
    """
    check_floating("cosine_similarity", predictions=predictions, targets=targets)
    if where is not None:
        predictions, targets = torch.where(where, predictions, 0.0), torch.where(where, targets, 0.0)
    return total(_unit(predictions, epsilon, dim) * _unit(targets, epsilon, dim), dim)


def cosine_distance(
    predictions: Tensor,
    targets: Tensor,
    *,
    epsilon: Scalar = 0.0,
    dim: Dim | None = -1,
    where: Tensor | None = None,
) -> Tensor:
    """Compute 1 - `cosine_similarity`.

    Equals `optax.cosine_distance`.

    >>> ft.losses.cosine_distance(torch.tensor([1.0, 0.0]), torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]]))
    tensor([0.0000, 1.0000, 0.2929])
    """
    return 1.0 - cosine_similarity(predictions, targets, epsilon=epsilon, dim=dim, where=where)


def _errors(predictions: Tensor, targets: Tensor | None) -> Tensor:
    return predictions if targets is None else predictions - targets


def _unit(x: Tensor, epsilon: Scalar, dim: Dim | None) -> Tensor:
    square = total(x * x, dim, keepdim=True)
    low = epsilon.to(x.dtype) if isinstance(epsilon, Tensor) else square.new_full((), epsilon)
    return x / torch.sqrt(torch.maximum(square, low))
