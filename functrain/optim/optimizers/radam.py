"""RAdam: Adam that waits until its second moment can be trusted."""

from __future__ import annotations

import torch
from torch import Tensor

from functrain.optim.combining import chain
from functrain.optim.numerics.leafwise import by_parts, leafwise_squares
from functrain.optim.numerics.moments import debias, nesterov_factors, zero_moments
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
from functrain.optim.optimizers.adam import ScaleByAdamState
from functrain.optim.scaling import scale_by_learning_rate
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    Updates,
)
from functrain.schedules import Scalar, ScalarOrSchedule
from functrain.tree import Params


def scale_by_radam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    threshold: Scalar = 5.0,
    *,
    nesterov: bool = False,
) -> GradientTransformation:
    """Rescale updates as Adam does, times a rectification; below `threshold` to the first moment alone.

    The rectification is computed in float64: near the threshold float32, which optax uses, is off by percents.

    A complex leaf is taken for two real ones, as `torch.optim` does.

    Source: Liu et al. 2020 (arXiv:1908.03265), algorithm 2.

    >>> tx = ft.optim.scale_by_radam()
    >>> tx.update(torch.tensor([3.0, -0.5]), tx.init(torch.zeros(2)))[0]  # the gradient: its variance is not known yet
    tensor([ 3.0000, -0.5000])
    """

    def init(params: Params) -> ScaleByAdamState:
        return ScaleByAdamState(zero_count(params), zero_moments(params), zero_moments(params))

    def update(
        updates: Updates, state: ScaleByAdamState, params: Params | None = None
    ) -> tuple[Updates, ScaleByAdamState]:
        count = state.count + 1
        mu_factor, now_factor = nesterov_factors(b1, count, updates, nesterov)
        nu_factor = debias(b2, count, updates)
        trusted, ratio = _rectification(b2, count, threshold)
        rectification = scalar(ratio, updates)

        def step(g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            m = lerp(m, g, 1 - b1)
            v = lerp_over(v, abs_sq(g), 1 - b2)
            mu_hat = like(mu_factor, m) * m
            mu_hat = add_scaled(mu_hat, now_factor, g) if nesterov else mu_hat
            root = plus(torch.sqrt(above_zero(plus(like(nu_factor, v) * v, eps_root))), eps)
            return torch.where(trusted, like(rectification, v) * mu_hat / root, mu_hat), m, v

        updates, (mu, nu) = leafwise_squares(by_parts(step), updates, (state.mu, state.nu))
        return updates, ScaleByAdamState(count, mu, nu)

    return GradientTransformation(init, update)


def radam(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    threshold: Scalar = 5.0,
    *,
    nesterov: bool = False,
) -> GradientTransformationExtraArgs:
    """RAdam: `scale_by_radam`, then minus the learning rate. Equals `torch.optim.RAdam`.

    >>> optimizer, params = ft.optim.radam(0.1), torch.zeros(2)
    >>> optimizer.update(torch.tensor([3.0, -0.5]), optimizer.init(params), params)[0]
    tensor([-0.3000,  0.0500])
    """
    return chain(
        scale_by_radam(b1, b2, eps, eps_root, threshold, nesterov=nesterov),
        scale_by_learning_rate(learning_rate),
    )


def _rectification(b2: Scalar, count: Tensor, threshold: Scalar) -> tuple[Tensor, Tensor]:
    steps = count.to(torch.float64)
    decay = b2.to(torch.float64) if isinstance(b2, Tensor) else b2
    power = decay**steps
    longest = 2.0 / (1.0 - decay) - 1.0  # the length of the average in the end
    length = longest - 2 * steps * power / (1 - power)
    trusted = length >= threshold
    # where it is not used: a root of a negative number would be NaN, and its gradient with it
    safe = torch.where(trusted, length, longest)
    ratio = (safe - 4.0) * (safe - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * safe)
    return trusted, torch.sqrt(ratio)
