"""Gaussian posteriors over parameters: what they hold, and what is computed with their covariance.

n chosen parameters, which have the prior N(0, 1 / prior_precision). With D the prior's precisions on a diagonal and H
the curvature, the posterior's precision is H + D = D^(1/2) M D^(1/2), where M = 1 + D^(-1/2) H D^(-1/2) has no
eigenvalue below 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from functrain import random, tree
from functrain.compiler import engine
from functrain.curvature.vectors import flat, like
from functrain.tree import Params, Tree


class Diagonal(NamedTuple):
    """A posterior of which all parameters are independent."""

    mean: Tree  # like params: the chosen leaves as they were trained, None for the others
    fixed: Tree  # like params: the other leaves, None for the chosen
    curvature: Tree  # like mean, at least float32: diagonal of the curvature of the summed loss
    loss: Tensor  # (): the summed loss of the data, which is minus the log likelihood
    prior_precision: Tree  # (), or like mean: each leaf of a shape that broadcasts to the mean's


class Full(NamedTuple):
    """A posterior with the whole covariance of the chosen parameters."""

    mean: Tree  # like params: the chosen leaves as they were trained, None for the others
    fixed: Tree  # like params: the other leaves, None for the chosen
    curvature: Tensor  # (n, n), at least float32: curvature of the summed loss, in the order of `tree.leaves(mean)`
    loss: Tensor  # (): the summed loss of the data, which is minus the log likelihood
    prior_precision: Tree  # (), or like mean: each leaf of a shape that broadcasts to the mean's


Posterior: TypeAlias = Diagonal | Full


def sample(posterior: Posterior, key: Tensor) -> Params:
    """Draw parameters from the posterior; those that were not chosen are as they were trained.

    Many are a `vmap` over keys: `ft.vmap(lambda k: outputs_fn(sample(posterior, k), batch, None))(keys)`.

    >>> mean, curvature = {"w": torch.ones(2)}, {"w": torch.tensor([3.0, 99.0])}
    >>> posterior = ft.curvature.laplace.Diagonal(mean, {"w": None}, curvature, torch.zeros(()), torch.tensor(1.0))
    >>> ft.curvature.laplace.sample(posterior, ft.random.key(0))
    {'w': tensor([1.8113, 1.2025])}
    """
    mean, prior = flat(posterior.mean), precisions(posterior)  # (n,)
    noise = random.normal(key, mean.shape, mean.dtype)
    if isinstance(posterior, Diagonal):
        noise = noise / torch.sqrt(flat(posterior.curvature) + prior)
    else:
        root = factor(posterior, prior)  # (n, n)
        noise = torch.linalg.solve_triangular(root.mT, noise[:, None], upper=True)[:, 0] / torch.sqrt(prior)
    return tree.combine(like(mean + noise, posterior.mean), posterior.fixed)


def covariance(posterior: Posterior, jacobian: Tensor) -> Tensor:
    """Return J S J' for the posterior's covariance S and each example's J.

    Shapes: jacobian (B, C, n), the result (B, C, C).
    """
    prior = precisions(posterior)  # (n,)
    if isinstance(posterior, Diagonal):
        return (jacobian / (flat(posterior.curvature) + prior)) @ jacobian.mT
    rows = (jacobian / torch.sqrt(prior)).flatten(0, 1)  # (B C, n)
    solved = torch.linalg.solve_triangular(factor(posterior, prior), rows.T, upper=False)  # (n, B C)
    halves = solved.T.unflatten(0, jacobian.shape[:2])  # (B, C, n)
    return halves @ halves.mT


def log_det_ratio(posterior: Posterior) -> Tensor:
    """Return the logarithm of the determinant of the posterior's precision over that of the prior's, ()."""
    prior = precisions(posterior)
    if isinstance(posterior, Diagonal):
        return torch.sum(torch.log1p(flat(posterior.curvature) / prior))
    return 2 * torch.sum(torch.log(torch.diagonal(factor(posterior, prior))))


def determined(posterior: Posterior) -> Tensor:
    """Return for each parameter in which part, of 0 to 1, the data determine it, and not the prior, (n,)."""
    prior = precisions(posterior)
    if isinstance(posterior, Diagonal):
        curvature = flat(posterior.curvature)
        return curvature / (curvature + prior)
    # a product, where 1 - D S would lose the digits of what is hardly determined
    return torch.sum(_scaled(posterior, prior) * torch.cholesky_inverse(factor(posterior, prior)), 1)


def factor(posterior: Full, prior: Tensor) -> Tensor:
    """Return the lower triangular L, (n, n), of L L' = M.

    Raises: ValueError for a curvature so negative that the posterior has no covariance (inside of `ft.compile` and
    `ft.vmap` the result is NaN).
    """
    m = _scaled(posterior, prior) + torch.eye(len(prior), dtype=prior.dtype, device=prior.device)
    root, failed = torch.linalg.cholesky_ex(m)
    if engine.concrete() and bool(failed):
        raise ValueError(
            "laplace: expected a positive definite precision of the posterior, came one that is not; take a loss that "
            "is convex in the outputs, or a larger prior_precision"
        )
    return torch.where(failed == 0, root, torch.nan)


def precisions(posterior: Posterior) -> Tensor:
    """Return the prior's precision of each parameter, (n,).

    Raises: ValueError naming the path where it does not broadcast to the mean.
    """
    dtype = flat(posterior.mean).dtype
    prior = posterior.prior_precision
    if not isinstance(prior, (int, float, Tensor)):
        tree.check_same_structure(posterior.mean, prior, what="laplace: prior_precision")
        leaves = tree.leaves(prior)
    else:
        leaves = [prior] * len(tree.leaves(posterior.mean))
    rows = []
    for (path, leaf), given in zip(tree.items(posterior.mean), leaves, strict=True):
        one = given if isinstance(given, Tensor) else torch.full((), given, device=leaf.device)
        if not _broadcasts(one.shape, leaf.shape):
            raise ValueError(
                f"laplace: prior_precision: {path or 'the root'}: expected a shape that broadcasts to "
                f"{tuple(leaf.shape)}, came {tuple(one.shape)}; give a () tensor for all, or a tree like posterior.mean"
            )
        rows.append(one.to(dtype).expand(leaf.shape).reshape(-1))
    return torch.cat(rows)


def _broadcasts(small: Sequence[int], large: Sequence[int]) -> bool:
    ends = large[len(large) - len(small) :]
    return len(small) <= len(large) and all(a in (1, b) for a, b in zip(small, ends, strict=True))


def _scaled(posterior: Full, prior: Tensor) -> Tensor:
    roots = torch.sqrt(prior)
    return posterior.curvature / roots[:, None] / roots  # (n, n)
