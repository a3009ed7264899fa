"""AdEMAMix: Adam with a second, much slower first moment."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from functrain.optim.combining import chain
from functrain.optim.decay import add_decayed_weights
from functrain.optim.masking import MaskOrFn
from functrain.optim.numerics.leafwise import by_parts, leafwise_squares
from functrain.optim.numerics.moments import debias, zero_moments
from functrain.optim.numerics.safe import (
    above_zero,
    abs_sq,
    add_scaled,
    lerp,
    lerp_over,
    like,
    plus,
    scalar,
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


class ScaleByAdemamixState(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far
    count_m2: Tensor  # (), int64: updates so far, for the schedules of b3 and alpha
    m1: Tree  # like params, in mu_dtype if given: fast first moment
    m2: Tree  # like params, in mu_dtype if given: slow first moment
    nu: Tree  # like params, in mu_dtype if given: second moment


class ScaleBySimplifiedAdEMAMixState(NamedTuple):
    t: Tensor  # (), int64: updates so far
    m: Tree  # like params: decayed sum of updates
    n: Tree  # like params: second moment


def scale_by_ademamix(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    b3: ScalarOrSchedule = 0.9999,
    alpha: ScalarOrSchedule = 6.0,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """Rescale updates to (m1 + alpha * m2) / (sqrt(nu + eps_root) + eps), m1 and nu corrected for their start at zero.

    A complex update's square is |g|², as in optax.

    Source: Pagliardini et al. 2024 (arXiv:2409.03137), algorithm 1.

    >>> tx = ft.optim.scale_by_ademamix(b3=0.99, alpha=5.0)
    >>> tx.update(torch.tensor([3.0, -0.5]), tx.init(torch.zeros(2)))[0]  # 1 + 5 * 0.01
    tensor([ 1.0500, -1.0500])
    """

    def init(params: Params) -> ScaleByAdemamixState:
        m1, m2, nu = [zero_moments(params, mu_dtype) for _ in range(3)]
        return ScaleByAdemamixState(zero_count(params), zero_count(params), m1, m2, nu)

    def update(
        updates: Updates, state: ScaleByAdemamixState, params: Params | None = None
    ) -> tuple[Updates, ScaleByAdemamixState]:
        count = state.count + 1
        m1_factor, nu_factor = debias(b1, count, updates), debias(b2, count, updates)
        slow = scalar(b3(state.count_m2) if callable(b3) else b3, updates)
        share = scalar(alpha(state.count_m2) if callable(alpha) else alpha, updates)

        def step(g: Tensor, m1: Tensor, m2: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            m1 = lerp(m1, g, 1 - b1)
            m2 = lerp(m2, g, 1 - slow)
            v = lerp_over(v, abs_sq(g), 1 - b2)
            mixed = add_scaled(like(m1_factor, m1) * m1, share, m2)
            return mixed / plus(torch.sqrt(above_zero(plus(like(nu_factor, v) * v, eps_root))), eps), m1, m2, v

        updates, (m1, m2, nu) = leafwise_squares(step, updates, (state.m1, state.m2, state.nu))
        return updates, ScaleByAdemamixState(count, state.count_m2 + 1, m1, m2, nu)

    return GradientTransformation(init, update)


def ademamix(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    b3: ScalarOrSchedule = 0.9999,
    alpha: ScalarOrSchedule = 5.0,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn = None,
) -> GradientTransformationExtraArgs:
    """AdEMAMix: `scale_by_ademamix`, then decoupled weight decay, then minus the learning rate.

    >>> params, optimizer = torch.tensor([1.0, -2.0]), ft.optim.ademamix(0.1, b3=0.99)
    >>> optimizer.update(torch.tensor([3.0, -0.5]), optimizer.init(params), params)[0]
    tensor([-0.1050,  0.1050])
    """
    return chain(
        scale_by_ademamix(b1, b2, b3, alpha, eps, eps_root, mu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


def scale_by_simplified_ademamix(
    b1: Scalar = 0.99,
    b2: Scalar = 0.95,
    alpha: ScalarOrSchedule = 0.0,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
) -> GradientTransformation:
    """Rescale updates to (m + alpha * updates) / (sqrt(n + eps_root) + eps), where m adds up updates.

    A complex leaf is taken for two real ones, as `torch.optim` does.

    Source: Morwani et al. 2025 (arXiv:2502.02431).

    >>> grads, tx = torch.tensor([3.0, -0.5]), ft.optim.scale_by_simplified_ademamix(b1=0.9)
    >>> first, state = tx.update(grads, tx.init(torch.zeros(2)))
    >>> first, tx.update(grads, state)[0]
    (tensor([ 1.0000, -1.0000]), tensor([ 1.9000, -1.9000]))
    """

    def init(params: Params) -> ScaleBySimplifiedAdEMAMixState:
        return ScaleBySimplifiedAdEMAMixState(zero_count(params), zero_moments(params), zero_moments(params))

    def update(
        updates: Updates, state: ScaleBySimplifiedAdEMAMixState, params: Params | None = None
    ) -> tuple[Updates, ScaleBySimplifiedAdEMAMixState]:
        count = state.t + 1
        factor = debias(b2, count, updates)
        share = scalar(alpha(state.t) if callable(alpha) else alpha, updates)

        def step(g: Tensor, m: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            m = add_scaled(g, b1, m)
            n = lerp(n, g * g, 1 - b2)
            return (
                add_scaled(m, share, g) / plus(torch.sqrt(above_zero(plus(like(factor, n) * n, eps_root))), eps),
                m,
                n,
            )

        updates, (m, n) = leafwise_squares(by_parts(step), updates, (state.m, state.n))
        return updates, ScaleBySimplifiedAdEMAMixState(count, m, n)

    return GradientTransformation(init, update)


def simplified_ademamix(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.99,
    b2: Scalar = 0.95,
    alpha: ScalarOrSchedule = 0.0,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn = None,
) -> GradientTransformationExtraArgs:
    """Simplified AdEMAMix: `scale_by_simplified_ademamix`, decoupled weight decay, then minus the learning rate.

    >>> params, optimizer = torch.tensor([1.0, -2.0]), ft.optim.simplified_ademamix(0.1, alpha=1.0)
    >>> optimizer.update(torch.tensor([3.0, -0.5]), optimizer.init(params), params)[0]
    tensor([-0.2000,  0.2000])
    """
    return chain(
        scale_by_simplified_ademamix(b1, b2, alpha, eps, eps_root),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
