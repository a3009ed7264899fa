"""Derivatives of functions that have none, from their values at perturbed arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

import functrain.random as random
import functrain.tree as tree
from functrain.optim.numerics.random_trees import random_like
from functrain.schedules import Scalar
from functrain.transforms import vmap
from functrain.tree import Tree, elsewhere

__all__ = ["Gumbel", "Noise", "Normal", "make_perturbed_fun"]


class Noise(Protocol):
    """A distribution: what to draw, and the logarithm of its density, up to a constant."""

    def sample(self, key: Tensor, sample_shape: tuple[int, ...], dtype: torch.dtype) -> Tensor: ...

    def log_prob(self, inputs: Tensor) -> Tensor: ...


class Normal:
    """The standard normal distribution."""

    def sample(self, key: Tensor, sample_shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw `ft.random.normal`."""
        return random.normal(key, sample_shape, dtype)

    def log_prob(self, inputs: Tensor) -> Tensor:
        """Return -x**2 / 2."""
        return -0.5 * inputs**2


class Gumbel:
    """The standard Gumbel distribution: the largest of many independent numbers."""

    def sample(self, key: Tensor, sample_shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw -log(-log(uniform)). Equals `jax.random.gumbel` to float rounding."""
        tiny = torch.finfo(dtype).tiny  # the least number that has a logarithm
        return -torch.log(-torch.log(random.uniform(key, sample_shape, dtype, tiny, 1.0)))

    def log_prob(self, inputs: Tensor) -> Tensor:
        """Return -x - exp(-x)."""
        return -inputs - torch.exp(-inputs)


_GUMBEL = Gumbel()


def make_perturbed_fun(
    fun: Callable[[Tree], Tree],
    num_samples: int = 1000,
    sigma: Scalar = 0.1,
    noise: Noise = _GUMBEL,
    use_baseline: bool = True,
) -> Callable[[Tensor, Tree], Tree]:
    """Make `(key, x) -> mean of fun(x + sigma * noise)` over `num_samples` draws, which has derivatives of every order.

    They are unbiased estimates of those of the expectation, made of values of `fun` alone: it may be a step or an
    argmax. `use_baseline` subtracts fun(x), which leaves the expectation and lowers the variance.

    `fun` takes and returns trees of floating-point tensors. Equals `optax.perturbations.make_perturbed_fun`.

    Source: Berthet et al. 2020 (arXiv:2002.08676); Foerster et al. 2018 (arXiv:1802.05098), the magic box.

    >>> step = lambda x: (x > 0).float()  # a function without a useful derivative
    >>> noise = ft.optim.perturbations.Normal()
    >>> smooth = ft.optim.perturbations.make_perturbed_fun(step, num_samples=10000, sigma=1.0, noise=noise)
    >>> round(ft.grad(lambda x: smooth(ft.random.key(0), x))(torch.tensor(0.0)).item(), 1)  # 1 / sqrt(2 pi)
    0.4
    """

    def estimate(key: Tensor, x: Tree) -> Tree:
        baseline = fun(tree.map(torch.detach, x)) if use_baseline else None

        def one(key: Tensor) -> Tree:
            drawn = random_like(key, x, noise.sample)
            shifted = tree.map(lambda leaf, z: (leaf + sigma * z).detach(), x, drawn)
            # the same draw again, now as a function of x: its density is what depends on x
            z = tree.map(lambda leaf, moved: (moved - leaf) / sigma, x, shifted)
            log_prob = tree.sum(tree.map(noise.log_prob, z))
            box = torch.exp(log_prob - log_prob.detach())  # 1, with the derivative of log_prob
            out = tree.scale(box, fun(shifted))
            return tree.add_scale(out, 1 - box, baseline) if use_baseline else out

        return tree.map(lambda leaf: torch.mean(leaf, 0), vmap(one)(random.split(key, num_samples)))

    return estimate


elsewhere.furnish(__name__)
