"""Lion: the sign of an average of gradients."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from functrain.optim.combining import chain
from functrain.optim.decay import add_decayed_weights
from functrain.optim.masking import MaskOrFn
from functrain.optim.numerics.leafwise import leafwise
from functrain.optim.numerics.moments import zero_moments
from functrain.optim.numerics.safe import lerp, zero_count
from functrain.optim.scaling import scale_by_learning_rate
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    Updates,
)
from functrain.schedules import Scalar, ScalarOrSchedule
from functrain.tree import Params, Tree


class ScaleByLionState(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far
    mu: Tree  # like params, in mu_dtype if given: average of updates


def scale_by_lion(
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    mu_dtype: torch.dtype | None = None,
    *,
    mode: Literal["hard", "smooth", "refined"] = "hard",
    smooth_beta: float = 1.0,
) -> GradientTransformation:
    """Replace updates by the sign of (1 - b1) * updates + b1 * mu.

    "smooth" takes tanh(smooth_beta * x) for the sign of x; "refined" keeps x where it is smaller than 1. The sign of a
    complex number is its direction.

    Source: Chen et al. 2023 (arXiv:2302.06675), algorithm 2.

    >>> tx = ft.optim.scale_by_lion()
    >>> tx.update(torch.tensor([3.0, -0.01, 0.0]), tx.init(torch.zeros(3)))[0]
    tensor([ 1., -1.,  0.])
    """
    signs = {
        "hard": torch.sgn,
        "smooth": lambda x: torch.tanh(smooth_beta * x),
        "refined": lambda x: torch.where(torch.abs(x) < 1.0, x, torch.sgn(x)),
    }
    if mode not in signs:
        raise ValueError(f"scale_by_lion: mode must be one of {sorted(signs)}, came {mode!r}")
    sign = signs[mode]

    def init(params: Params) -> ScaleByLionState:
        return ScaleByLionState(zero_count(params), zero_moments(params, mu_dtype))

    def update(
        updates: Updates, state: ScaleByLionState, params: Params | None = None
    ) -> tuple[Updates, ScaleByLionState]:
        def step(g: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
            return sign(lerp(m, g, 1 - b1)), lerp(m, g, 1 - b2)

        updates, (mu,) = leafwise(step, updates, (state.mu,))
        return updates, ScaleByLionState(state.count + 1, mu)

    return GradientTransformation(init, update)


def lion(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    mu_dtype: torch.dtype | None = None,
    weight_decay: ScalarOrSchedule = 1e-3,
    mask: MaskOrFn = None,
) -> GradientTransformationExtraArgs:
    """Lion: `scale_by_lion`, then decoupled weight decay, then minus the learning rate.

    >>> params, optimizer = torch.tensor([1.0, -2.0]), ft.optim.lion(0.1, weight_decay=0.1)
    >>> optimizer.update(torch.tensor([3.0, -0.01]), optimizer.init(params), params)[0]
    tensor([-0.1100,  0.1200])
    """
    return chain(
        scale_by_lion(b1, b2, mu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
