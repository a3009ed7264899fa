"""Updates as large as the parameters that they are for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from functrain.optim.averaging import trace
from functrain.optim.combining import chain
from functrain.optim.decay import add_decayed_weights
from functrain.optim.masking import MaskOrFn, masked
from functrain.optim.numerics.leafwise import leafwise
from functrain.optim.numerics.safe import (
    like,
    plus,
    safe_norm,
    safe_root_mean_squares,
)
from functrain.optim.optimizers.adam import scale_by_adam
from functrain.optim.scaling import scale_by_learning_rate
from functrain.optim.transformation import (
    EmptyState,
    GradientTransformation,
    GradientTransformationExtraArgs,
    Updates,
    check_params,
    init_empty_state,
)
from functrain.schedules import Scalar, ScalarOrSchedule
from functrain.tree import Params

ScaleByTrustRatioState = EmptyState


def scale_by_trust_ratio(
    min_norm: Scalar = 0.0, trust_coefficient: Scalar = 1.0, eps: Scalar = 0.0
) -> GradientTransformation:
    """Rescale each leaf by trust_coefficient * norm of the parameter / (norm of the update + eps).

    No norm is smaller than `min_norm`; where one is 0, the update stays as it is.

    Source: You et al. 2020 (arXiv:1904.00962).

    >>> params, tx = torch.tensor([6.0, 8.0]), ft.optim.scale_by_trust_ratio()
    >>> tx.update(torch.tensor([0.0, 0.5]), tx.init(params), params)[0]
    tensor([ 0., 10.])
    """

    def rescale(u: Tensor, p: Tensor) -> Tensor:
        param_norm, update_norm = safe_norm(p, min_norm), safe_norm(u, min_norm)
        empty = (param_norm == 0) | (update_norm == 0)
        ratio = like(trust_coefficient, p) * param_norm / plus(torch.where(empty, 1.0, update_norm), eps)
        return u * torch.where(empty, 1.0, ratio).to(u.dtype)

    return _with_params("scale_by_trust_ratio", rescale)


def scale_by_param_block_norm(min_scale: Scalar = 1e-3) -> GradientTransformation:
    """Multiply each leaf by the norm of its parameter, at least `min_scale`.

    >>> params, tx = torch.tensor([3.0, 4.0]), ft.optim.scale_by_param_block_norm()
    >>> tx.update(torch.ones(2), tx.init(params), params)[0]
    tensor([5., 5.])
    """
    return _with_params("scale_by_param_block_norm", lambda u, p: u * safe_norm(p, min_scale).to(u.dtype))


def scale_by_param_block_rms(min_scale: Scalar = 1e-3) -> GradientTransformation:
    """Multiply each leaf by the root mean square of its parameter, at least `min_scale`.

    >>> params, tx = torch.tensor([1.0, 7.0]), ft.optim.scale_by_param_block_rms()
    >>> tx.update(torch.ones(2), tx.init(params), params)[0]
    tensor([5., 5.])
    """
    return _with_params("scale_by_param_block_rms", lambda u, p: u * safe_root_mean_squares(p, min_scale).to(u.dtype))


def lars(
    learning_rate: ScalarOrSchedule,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: MaskOrFn = True,
    trust_coefficient: Scalar = 0.001,
    eps: Scalar = 0.0,
    trust_ratio_mask: MaskOrFn = True,
    momentum: Scalar = 0.9,
    nesterov: bool = False,
) -> GradientTransformationExtraArgs:
    """LARS: momentum over gradients with weight decay, each leaf by its trust ratio.

    Source: You et al. 2017 (arXiv:1708.03888), algorithm 1.

    >>> params, optimizer = torch.tensor([3.0, 4.0]), ft.optim.lars(1.0, trust_coefficient=0.01)
    >>> optimizer.update(torch.tensor([0.0, 20.0]), optimizer.init(params), params)[0]
    tensor([ 0.0000, -0.0500])
    """
    return chain(
        add_decayed_weights(weight_decay, weight_decay_mask),
        masked(scale_by_trust_ratio(trust_coefficient=trust_coefficient, eps=eps), trust_ratio_mask),
        scale_by_learning_rate(learning_rate),
        trace(momentum, nesterov),
    )


def lamb(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    eps_root: Scalar = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn = None,
) -> GradientTransformationExtraArgs:
    """LAMB: AdamW, each leaf by its trust ratio. Source: You et al. 2020 (arXiv:1904.00962), algorithm 2.

    >>> params, optimizer = torch.tensor([6.0, 8.0]), ft.optim.lamb(0.01)
    >>> updates, _ = optimizer.update(torch.tensor([5.0, -0.1]), optimizer.init(params), params)
    >>> ft.optim.global_norm(updates)  # 0.01 times the norm of the params
    tensor(0.1000)
    """
    return chain(
        scale_by_adam(b1, b2, eps, eps_root),
        add_decayed_weights(weight_decay, mask),
        scale_by_trust_ratio(),
        scale_by_learning_rate(learning_rate),
    )


def fromage(learning_rate: ScalarOrSchedule, min_norm: Scalar = 1e-6) -> GradientTransformationExtraArgs:
    """Fromage: a step relative to the norm of each leaf, which then shrinks so that norms stay.

    Source: Bernstein et al. 2020 (arXiv:2002.03432), algorithm 1.

    >>> params, optimizer = torch.tensor([3.0, 4.0]), ft.optim.fromage(0.1)
    >>> updates, _ = optimizer.update(torch.tensor([4.0, -3.0]), optimizer.init(params), params)
    >>> round(ft.optim.global_norm(params + updates).item(), 4)
    5.0
    """
    if not callable(learning_rate):
        shrink = 1 / (1 + learning_rate**2) ** 0.5
        return chain(
            scale_by_trust_ratio(min_norm),
            scale_by_learning_rate(learning_rate * shrink),
            add_decayed_weights(shrink - 1),
        )
    rate = learning_rate

    def shrink_at(count: Tensor) -> Scalar:
        return 1 / (1 + rate(count) ** 2) ** 0.5

    return chain(
        scale_by_trust_ratio(min_norm),
        scale_by_learning_rate(lambda count: shrink_at(count) * rate(count)),
        add_decayed_weights(lambda count: shrink_at(count) - 1),
    )


def _with_params(name: str, rescale: Callable[[Tensor, Tensor], Tensor]) -> GradientTransformation:
    def update(updates: Updates, state: EmptyState, params: Params | None = None) -> tuple[Updates, EmptyState]:
        check_params(params, name)
        new, _ = leafwise(lambda u, p: (rescale(u, p),), updates, (), params)
        return new, state

    return GradientTransformation(init_empty_state, update)
