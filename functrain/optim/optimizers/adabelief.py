"""AdaBelief: Adam that divides by how far gradients are from their average."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from functrain.optim.combining import chain
from functrain.optim.numerics.leafwise import leafwise_squares
from functrain.optim.numerics.moments import debias, nesterov_factors, zero_moments
from functrain.optim.numerics.safe import (
    above_zero,
    abs_sq,
    add_scaled,
    lerp,
    like,
    plus,
    zero_count,
)
from functrain.optim.scaling import scale_by_learning_rate
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    Updates,
)
from functrain.schedules import Scalar, ScalarOrSchedule
from functrain.tree import Params, Tree


class ScaleByBeliefState(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far
    mu: Tree  # like params: first moment
    nu: Tree  # like params: average of the squared distance of updates from mu


def scale_by_belief(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-16,
    eps_root: Scalar = 1e-16,
    *,
    nesterov: bool = False,
) -> GradientTransformation:
    """Rescale updates to mu / (sqrt(nu) + eps); every update adds `eps_root` to nu.

    A complex update's square is |g|², as in optax.

    Source: Zhuang et al. 2020 (arXiv:2010.07468), algorithm 2.

    >>> tx = ft.optim.scale_by_belief()
    >>> tx.update(torch.tensor([3.0, -0.5]), tx.init(torch.zeros(2)))[0]
    tensor([ 1.1111, -1.1111])
    """

    def init(params: Params) -> ScaleByBeliefState:
        return ScaleByBeliefState(zero_count(params), zero_moments(params), zero_moments(params))

    def update(
        updates: Updates, state: ScaleByBeliefState, params: Params | None = None
    ) -> tuple[Updates, ScaleByBeliefState]:
        count = state.count + 1
        mu_factor, now_factor = nesterov_factors(b1, count, updates, nesterov)
        nu_factor = debias(b2, count, updates)

        def step(g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            m = lerp(m, g, 1 - b1)
            v = plus(lerp(v, abs_sq(g - m), 1 - b2), eps_root)
            mu_hat = like(mu_factor, m) * m
            mu_hat = add_scaled(mu_hat, now_factor, g) if nesterov else mu_hat
            return mu_hat / plus(torch.sqrt(above_zero(like(nu_factor, v) * v)), eps), m, v

        updates, (mu, nu) = leafwise_squares(step, updates, (state.mu, state.nu))
        return updates, ScaleByBeliefState(count, mu, nu)

    return GradientTransformation(init, update)


def adabelief(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-16,
    eps_root: Scalar = 1e-16,
    *,
    nesterov: bool = False,
) -> GradientTransformationExtraArgs:
    """AdaBelief: `scale_by_belief`, then minus the learning rate.

    >>> optimizer, params = ft.optim.adabelief(0.1), torch.zeros(2)
    >>> optimizer.update(torch.tensor([3.0, -0.5]), optimizer.init(params), params)[0]
    tensor([-0.1111,  0.1111])
    """
    return chain(
        scale_by_belief(b1, b2, eps, eps_root, nesterov=nesterov),
        scale_by_learning_rate(learning_rate),
    )
