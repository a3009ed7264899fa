"""AdaMax: Adam with the largest gradient in place of the root mean square."""

from __future__ import annotations

import torch
from torch import Tensor

from functrain.optim.combining import chain
from functrain.optim.decay import add_decayed_weights
from functrain.optim.masking import MaskOrFn
from functrain.optim.numerics.leafwise import by_parts, leafwise
from functrain.optim.numerics.moments import debias, zero_moments
from functrain.optim.numerics.safe import (
    lerp,
    like,
    plus,
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


def scale_by_adamax(b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-8) -> GradientTransformation:
    """Rescale updates to their average over the decayed largest of their sizes.

    A complex leaf is taken for two real ones, as `torch.optim` does.

    Source: Kingma and Ba 2015 (arXiv:1412.6980), algorithm 2.

    >>> tx = ft.optim.scale_by_adamax()
    >>> tx.update(torch.tensor([3.0, -0.5]), tx.init(torch.zeros(2)))[0]
    tensor([ 1.0000, -1.0000])
    """

    def init(params: Params) -> ScaleByAdamState:
        return ScaleByAdamState(zero_count(params), zero_moments(params), zero_moments(params))

    def update(
        updates: Updates, state: ScaleByAdamState, params: Params | None = None
    ) -> tuple[Updates, ScaleByAdamState]:
        count = state.count + 1
        factor = debias(b1, count, updates)

        def step(g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            m = lerp(m, g, 1 - b1)
            v = torch.maximum(plus(torch.abs(g), eps), like(b2, v) * v)
            return like(factor, m) * m / v, m, v

        updates, (mu, nu) = leafwise(by_parts(step), updates, (state.mu, state.nu))
        return updates, ScaleByAdamState(count, mu, nu)

    return GradientTransformation(init, update)


def adamax(
    learning_rate: ScalarOrSchedule, b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-8
) -> GradientTransformationExtraArgs:
    """AdaMax: `scale_by_adamax`, then minus the learning rate. Equals `torch.optim.Adamax`.

    >>> optimizer, params = ft.optim.adamax(0.1), torch.zeros(2)
    >>> optimizer.update(torch.tensor([3.0, -0.5]), optimizer.init(params), params)[0]
    tensor([-0.1000,  0.1000])
    """
    return chain(scale_by_adamax(b1, b2, eps), scale_by_learning_rate(learning_rate))


def adamaxw(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: MaskOrFn = None,
) -> GradientTransformationExtraArgs:
    """AdaMax with weight decay that does not pass through its moments.

    >>> params, optimizer = torch.tensor([10.0, -10.0]), ft.optim.adamaxw(0.1, weight_decay=0.01)
    >>> optimizer.update(torch.tensor([3.0, -0.5]), optimizer.init(params), params)[0]
    tensor([-0.1100,  0.1100])
    """
    return chain(
        scale_by_adamax(b1, b2, eps),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
