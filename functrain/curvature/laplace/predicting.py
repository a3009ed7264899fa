"""What a posterior says about the outputs.

B examples in a batch, C outputs of one example, n chosen parameters.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from functrain.curvature.laplace.fitting import OutputsFn, jacobians
from functrain.curvature.laplace.posterior import Diagonal, Full, covariance
from functrain.transforms.per_example import chunks
from functrain.tree import Batch


class Prediction(NamedTuple):
    mean: Tensor  # (B, C): outputs of the trained parameters
    covariance: Tensor  # (B, C, C): of the outputs, as params are uncertain; noise of observations comes on top


def predict(
    outputs_fn: OutputsFn, posterior: Diagonal | Full, batch: Batch, *, chunk_size: int | None = None
) -> Prediction:
    """Return the Gaussian of the outputs, which are linearized in the parameters around the mean.

    It is exact for outputs that are linear in the chosen parameters, as in those of a last layer. The curvature of a
    Gauss-Newton fit is that of this linear model, so that samples of a network with `sample` are further off.

    Shapes: every batch leaf is (B, ...); outputs of several dimensions are flattened to C.
    Source: Immer et al. 2021 (arXiv:2008.08400).

    >>> mean, curvature = {"w": torch.ones(2)}, {"w": torch.tensor([3.0, 1.0])}
    >>> posterior = ft.curvature.laplace.Diagonal(mean, {"w": None}, curvature, torch.zeros(()), torch.tensor(1.0))
    >>> batch = {"x": torch.tensor([[2.0, 0.0], [0.0, 2.0]])}
    >>> found = ft.curvature.laplace.predict(lambda params, batch, key: batch["x"] @ params["w"], posterior, batch)
    >>> found.mean.flatten(), found.covariance.flatten()
    (tensor([2., 2.]), tensor([1., 2.]))
    """
    rows = []
    for part, _ in chunks("laplace.predict", batch, chunk_size):
        z, jacobian, _, _ = jacobians(outputs_fn, posterior.mean, posterior.fixed, part)
        rows.append(Prediction(z, covariance(posterior, jacobian)))
    return Prediction(*[torch.cat(leaves) for leaves in zip(*rows, strict=True)])


def moderate(prediction: Prediction) -> Tensor:
    """Return logits (B, C) whose sigmoid, or softmax, is close to the mean one of the predicted Gaussian's.

    The outputs divided by sqrt(1 + pi / 8 * variance): what is uncertain comes nearer to even odds.

    Source: MacKay 1992, "The evidence framework applied to classification networks", for the sigmoid; Lu et al. 2020
    (arXiv:2006.07584) for the softmax.

    >>> prediction = ft.curvature.laplace.Prediction(torch.tensor([[2.0], [2.0]]), torch.tensor([[[0.0]], [[8.0]]]))
    >>> torch.sigmoid(ft.curvature.laplace.moderate(prediction))
    tensor([[0.8808],
            [0.7277]])
    """
    variance = torch.diagonal(prediction.covariance, dim1=-2, dim2=-1)  # (B, C)
    return prediction.mean / torch.sqrt(1 + math.pi / 8 * variance)
