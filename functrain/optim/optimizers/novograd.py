"""NovoGrad: gradients over a norm for each leaf."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.combining import chain
from functrain.optim.numerics.leafwise import leafwise
from functrain.optim.numerics.moments import moment_dtype, zero_moments
from functrain.optim.numerics.safe import (
    above_zero,
    abs_sq,
    add_scaled,
    lerp,
    plus,
    shrunk,
    zero_count,
)
from functrain.optim.scaling import scale_by_learning_rate
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    Updates,
    check_params,
)
from functrain.schedules import Scalar, ScalarOrSchedule
from functrain.tree import Params, Tree
from functrain.tree.reductions import length


class ScaleByNovogradState(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far
    mu: Tree  # like params, in mu_dtype if given: first moment
    nu: Tree  # () for each leaf of params: second moment of its norm


def scale_by_novograd(
    b1: Scalar = 0.9,
    b2: Scalar = 0.25,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """Add up updates that are divided by an average of their norm, leaf by leaf, plus weight decay.

    A complex update's square is |g|², as in optax.

    Source: Ginsburg et al. 2019 (arXiv:1905.11286), algorithm 1.

    Raises: ValueError without params.

    >>> params, tx = torch.zeros(2), ft.optim.scale_by_novograd()
    >>> tx.update(torch.tensor([3.0, 4.0]), tx.init(params), params)[0]
    tensor([0.6000, 0.8000])
    """

    def init(params: Params) -> ScaleByNovogradState:
        mu = zero_moments(params, mu_dtype)
        return ScaleByNovogradState(
            zero_count(params), mu, tree.map(lambda p: p.new_zeros((), dtype=moment_dtype(p)), params)
        )

    def update(
        updates: Updates, state: ScaleByNovogradState, params: Params | None = None
    ) -> tuple[Updates, ScaleByNovogradState]:
        check_params(params, "scale_by_novograd")
        first = state.count == 0

        def step(g: Tensor, m: Tensor, v: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            g = shrunk(g, length(g))
            square = torch.sum(abs_sq(g))
            v = torch.where(first, square, lerp(v, square, 1 - b2))
            u = add_scaled(g / plus(torch.sqrt(above_zero(plus(v, eps_root))), eps), weight_decay, p)
            m = torch.where(first, u, add_scaled(u, b1, m))
            return m, m, v

        updates, (mu, nu) = leafwise(step, updates, (state.mu, state.nu), params)
        return updates, ScaleByNovogradState(state.count + 1, mu, nu)

    return GradientTransformation(init, update)


def novograd(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.25,
    eps: Scalar = 1e-6,
    eps_root: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
) -> GradientTransformationExtraArgs:
    """NovoGrad: `scale_by_novograd`, then minus the learning rate.

    >>> params, optimizer = torch.zeros(2), ft.optim.novograd(0.1)
    >>> optimizer.update(torch.tensor([3.0, 4.0]), optimizer.init(params), params)[0]
    tensor([-0.0600, -0.0800])
    """
    return chain(
        scale_by_novograd(b1, b2, eps, eps_root, weight_decay),
        scale_by_learning_rate(learning_rate),
    )
