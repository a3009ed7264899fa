"""AMSGrad: Adam whose second moment never shrinks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from functrain.optim.combining import chain
from functrain.optim.numerics.leafwise import by_parts, leafwise_squares
from functrain.optim.numerics.moments import debias, zero_moments
from functrain.optim.numerics.safe import (
    above_zero,
    abs_sq,
    lerp,
    lerp_over,
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


class ScaleByAmsgradState(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far
    mu: Tree  # like params, in mu_dtype if given: first moment
    nu: Tree  # like params: second moment
    nu_max: Tree  # like params: the largest second moment so far


def scale_by_amsgrad(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
) -> GradientTransformation:
    """Rescale updates to mu / (sqrt(nu_max + eps_root) + eps).

    The paper corrects neither moment for its start at zero. A complex leaf is taken for two real ones, as `torch.optim`
    does. Source: Reddi et al. 2018 (arXiv:1904.09237), algorithm 2.

    >>> tx = ft.optim.scale_by_amsgrad(b1=0.0, b2=0.5)
    >>> _, state = tx.update(torch.tensor([4.0]), tx.init(torch.zeros(1)))
    >>> tx.update(torch.tensor([1.0]), state)[0]  # divided by 4, the largest so far
    tensor([0.2500])
    """

    def init(params: Params) -> ScaleByAmsgradState:
        return ScaleByAmsgradState(
            zero_count(params), zero_moments(params, mu_dtype), zero_moments(params), zero_moments(params)
        )

    def update(
        updates: Updates, state: ScaleByAmsgradState, params: Params | None = None
    ) -> tuple[Updates, ScaleByAmsgradState]:
        count = state.count + 1
        mu_factor = debias(b1, count, updates) if bias_correction_mu else 1.0
        nu_factor = debias(b2, count, updates) if bias_correction_nu else 1.0

        def step(g: Tensor, m: Tensor, v: Tensor, largest: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            m = lerp(m, g, 1 - b1)
            v = lerp_over(v, abs_sq(g), 1 - b2)
            largest = torch.maximum(largest, like(nu_factor, v) * v)
            return like(mu_factor, m) * m / plus(torch.sqrt(above_zero(plus(largest, eps_root))), eps), m, v, largest

        updates, (mu, nu, nu_max) = leafwise_squares(by_parts(step), updates, (state.mu, state.nu, state.nu_max))
        return updates, ScaleByAmsgradState(count, mu, nu, nu_max)

    return GradientTransformation(init, update)


def amsgrad(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
) -> GradientTransformationExtraArgs:
    """AMSGrad: `scale_by_amsgrad`, then minus the learning rate.

    >>> optimizer, params = ft.optim.amsgrad(0.1), torch.zeros(2)
    >>> optimizer.update(torch.tensor([3.0, -0.01]), optimizer.init(params), params)[0]
    tensor([-0.1000,  0.1000])
    """
    return chain(
        scale_by_amsgrad(b1, b2, eps, eps_root, mu_dtype, bias_correction_mu, bias_correction_nu),
        scale_by_learning_rate(learning_rate),
    )
