"""How well a posterior's prior explains the data, and the prior that does it best."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from functrain import tree
from functrain.curvature.laplace.posterior import Diagonal, Full, determined, log_det_ratio, precisions
from functrain.curvature.vectors import flat, like, wide
from functrain.tree import Tree

P = TypeVar("P", Diagonal, Full)


def log_marginal_likelihood(posterior: Diagonal | Full) -> Tensor:
    """Return the logarithm of the likelihood of the data under the prior, (): minus the loss, and what the fit costs.

    Exact where the log likelihood is quadratic, as a linear model with Gaussian noise has it, at its optimum under this
    prior. It can be differentiated in everything that the posterior was made of, such as the noise in a loss. Only
    differences count, unless the loss is minus the log likelihood with all of its constants.

    Source: MacKay 1992, "Bayesian interpolation"; Immer et al. 2021 (arXiv:2104.04975).

    >>> mean, curvature = {"w": torch.ones(2)}, {"w": torch.tensor([3.0, 1.0])}
    >>> posterior = ft.curvature.laplace.Diagonal(mean, {"w": None}, curvature, torch.zeros(()), torch.tensor(1.0))
    >>> ft.curvature.laplace.log_marginal_likelihood(posterior)
    tensor(-2.0397)
    """
    square = torch.sum(precisions(posterior) * flat(posterior.mean) ** 2)
    return -posterior.loss - (log_det_ratio(posterior) + square) / 2


def maximize_evidence(posterior: P, *, steps: int = 30) -> P:
    """Return the posterior with the prior precision that maximizes the log marginal likelihood, its mean as it is.

    There is one maximum. The precision keeps its structure: () is one for all parameters; a tree of () tensors, such as
    `ft.tree.map(lambda leaf: torch.ones(()), posterior.mean)`, one for each leaf. A step about halves the distance to
    the maximum, in the logarithm, or does better. Bounds are 1e-12 and 1e12, where leaves of zeros end.

    The mean was trained under another prior: train again under the new one, and so on, for a maximum of both.

    Source: MacKay 1992, "Bayesian interpolation", for the fixed point. A step goes half of the way to it: the evidence
    is log-concave in the logarithm of the precision, where the whole way may go back and forth for long.
    Raises: ValueError for steps < 1.

    >>> mean, curvature = {"w": torch.full((2,), 2.0)}, {"w": torch.full((2,), 1e6)}
    >>> posterior = ft.curvature.laplace.Diagonal(mean, {"w": None}, curvature, torch.zeros(()), torch.tensor(1.0))
    >>> ft.curvature.laplace.maximize_evidence(posterior).prior_precision
    tensor(0.2500)
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"maximize_evidence: expected steps of at least 1, came {steps!r}")
    prior = posterior.prior_precision
    squares = _grouped(flat(posterior.mean) ** 2, posterior)
    logs = tree.map(torch.log, prior)
    for _ in range(steps):
        parts = _grouped(determined(posterior._replace(prior_precision=tree.map(torch.exp, logs))), posterior)
        logs = tree.map(_halfway, logs, parts, squares)
    return posterior._replace(prior_precision=tree.map(torch.exp, logs))


def _halfway(log: Tensor, part: Tensor, square: Tensor) -> Tensor:
    target = torch.log(torch.clamp(part, min=0.0)) - torch.log(square)
    # a leaf without elements is determined by nothing, and is zero
    moved = torch.where((part <= 0) & (square == 0), log, (log + target) / 2)
    return torch.clamp(moved, -12 * math.log(10), 12 * math.log(10)).to(log.dtype)


def _grouped(vector: Tensor, posterior: Diagonal | Full) -> Tree:
    """Add up the elements, (n,), that share a prior precision."""
    prior = posterior.prior_precision
    if isinstance(prior, Tensor) and prior.dim() == 0:
        return torch.sum(vector)
    return tree.map(lambda leaf, p: leaf.sum_to_size(p.shape), like(vector, wide(posterior.mean)), prior)
