"""Adam: the average of gradients over the root of the average of their squares."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from functrain.optim.combining import chain
from functrain.optim.decay import add_decayed_weights
from functrain.optim.masking import MaskOrFn
from functrain.optim.numerics.leafwise import by_parts, leafwise_squares
from functrain.optim.numerics.moments import debias, nesterov_factors, zero_moments
from functrain.optim.numerics.safe import abs_sq, add_scaled, lerp, lerp_over, like, over_root, squared, zero_count
from functrain.optim.scaling import scale_by_learning_rate
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    Updates,
)
from functrain.schedules import Scalar, ScalarOrSchedule
from functrain.tree import Params, Tree


class ScaleByAdamState(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far
    mu: Tree  # like params, of float16 float32, in mu_dtype if given: first moment
    nu: Tree  # like params, of float16 float32: second moment


def scale_by_adam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = False,
) -> GradientTransformation:
    """Rescale updates to mu / (sqrt(nu + eps_root) + eps), both moments corrected for their start at zero.

    Where a gradient was always zero, the derivative of the root counts as 0; a positive `eps_root` makes it small near
    zero too. `nesterov` looks one step ahead in mu. An element of a gradient above 2**56 (in float64 2**504) counts as
    that.

    A complex leaf is taken for two real ones, as `torch.optim` does.

    Source: Kingma and Ba 2015 (arXiv:1412.6980), algorithm 1; Dozat 2016, algorithm 2 without its last factor b2.

    >>> tx = ft.optim.scale_by_adam()
    >>> tx.update(torch.tensor([3.0, -0.01]), tx.init(torch.zeros(2)))[0]
    tensor([ 1.0000, -1.0000])
    """

    def init(params: Params) -> ScaleByAdamState:
        return ScaleByAdamState(zero_count(params), zero_moments(params, mu_dtype), zero_moments(params))

    def update(
        updates: Updates, state: ScaleByAdamState, params: Params | None = None
    ) -> tuple[Updates, ScaleByAdamState]:
        count = state.count + 1
        mu_factor, now_factor = nesterov_factors(b1, count, updates, nesterov)
        nu_factor = debias(b2, count, updates)

        def step(g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            m = lerp(m, g, 1 - b1)
            v = lerp_over(v, abs_sq(g) if nesterov else squared(g), 1 - b2)
            mu_hat = like(mu_factor, m) * m
            mu_hat = add_scaled(mu_hat, now_factor, g) if nesterov else mu_hat
            nu_hat = like(nu_factor, v) * v
            return over_root(mu_hat, nu_hat, eps, eps_root), m, v

        updates, (mu, nu) = leafwise_squares(by_parts(step), updates, (state.mu, state.nu))
        return updates, ScaleByAdamState(count, mu, nu)

    return GradientTransformation(init, update)


def adam(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = False,
) -> GradientTransformationExtraArgs:
    """Adam: `scale_by_adam`, then minus the learning rate. Equals `torch.optim.Adam` without weight decay.

    >>> params, optimizer = {"w": torch.tensor([1.0, -2.0])}, ft.optim.adam(0.1)
    >>> state = optimizer.init(params)
    >>> updates, state = optimizer.update({"w": torch.tensor([3.0, -0.01])}, state, params)
    >>> ft.optim.apply_updates(params, updates)
    {'w': tensor([ 0.9000, -1.9000])}
    """
    return chain(
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov),
        scale_by_learning_rate(learning_rate),
    )


def adamw(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: MaskOrFn = None,
    *,
    nesterov: bool = False,
) -> GradientTransformationExtraArgs:
    """Adam with weight decay that does not pass through its moments. Equals `torch.optim.AdamW`.

    Source: Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2, the decay also scaled by the learning rate.

    >>> params, optimizer = torch.tensor([10.0, -10.0]), ft.optim.adamw(0.1, weight_decay=0.01)
    >>> optimizer.update(torch.tensor([1.0, 0.0]), optimizer.init(params), params)[0]  # the second decays only
    tensor([-0.1100,  0.0100])
    """
    return chain(
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


nadam = partial(adam, nesterov=True)
nadamw = partial(adamw, nesterov=True)
