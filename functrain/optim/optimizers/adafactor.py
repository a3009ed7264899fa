"""Adafactor: second moments of matrices kept as one row and one column."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.averaging import ema
from functrain.optim.clipping.norms import clip_by_block_rms
from functrain.optim.combining import chain
from functrain.optim.decay import add_decayed_weights
from functrain.optim.masking import MaskOrFn
from functrain.optim.numerics.leafwise import leafwise_squares
from functrain.optim.numerics.moments import moment_dtype, zero_moments
from functrain.optim.numerics.safe import (
    above_zero,
    abs_sq,
    lerp,
    plus,
    scalar,
    zero_count,
)
from functrain.optim.optimizers.trust_ratio import scale_by_param_block_rms
from functrain.optim.scaling import scale, scale_by_learning_rate
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    Updates,
    check_params,
    check_trainable,
)
from functrain.schedules import Scalar, ScalarOrSchedule
from functrain.tree import Params, Tree


class FactoredState(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far
    v_row: Tree  # like params without their largest dimension; (1,) where not factored
    v_col: Tree  # like params without their second largest dimension; (1,) where not factored
    v: Tree  # (1,) where factored; like params elsewhere


def _decay_rate_pow(step: Tensor, exponent: Scalar = 0.8) -> Tensor:
    return 1.0 - (step + 1) ** (-exponent)


def scale_by_factored_rms(
    factored: bool = True,
    decay_rate: Scalar = 0.8,
    step_offset: Scalar = 0,
    min_dim_size_to_factor: int = 128,
    epsilon: Scalar = 1e-30,
    decay_rate_fn: Callable[[Any, Any], Any] = _decay_rate_pow,
) -> GradientTransformation:
    """Divide updates by the root of an average of their squares, of which rows and columns only are kept.

    Leaves with two dimensions of at least `min_dim_size_to_factor` are factored along their two largest ones.
    `decay_rate_fn` makes the average's decay from (updates so far less `step_offset`, at least 0, in float64,
    decay_rate). In optax the decay of a count below the offset is NaN.

    A complex update's square is |g|², as in optax.

    Source: Shazeer and Stern 2018 (arXiv:1804.04235), algorithm 4.

    Raises: ValueError without params.

    >>> params, tx = torch.zeros(256, 128), ft.optim.scale_by_factored_rms()
    >>> state = tx.init(params)
    >>> state.v_row.shape, state.v_col.shape
    (torch.Size([128]), torch.Size([256]))
    """

    def dims_of(p: Tensor) -> tuple[int, int] | None:
        order = sorted(range(p.dim()), key=lambda dim: p.shape[dim])
        if not factored or p.dim() < 2 or p.shape[order[-2]] < min_dim_size_to_factor:
            return None
        return order[-2], order[-1]

    def init(params: Params) -> FactoredState:
        check_trainable(params)

        def zeros(p: Tensor, which: int) -> Tensor:
            dims = dims_of(p)
            if dims is None or which == 2:
                return zero_moments(p) if dims is None and which == 2 else p.new_zeros(1, dtype=moment_dtype(p))
            gone = dims[1 - which]
            kept = [size for dim, size in enumerate(p.shape) if dim != gone]
            return p.new_zeros(kept, dtype=moment_dtype(p))

        row, col, full = [tree.map(lambda p, which=which: zeros(p, which), params) for which in range(3)]
        return FactoredState(zero_count(params), row, col, full)

    def update(updates: Updates, state: FactoredState, params: Params | None = None) -> tuple[Updates, FactoredState]:
        check_params(params, "scale_by_factored_rms")
        steps = torch.clamp(state.count.to(torch.float64) - step_offset, min=0.0)
        rest = scalar(1.0 - decay_rate_fn(steps, decay_rate), updates)

        def step(g: Tensor, row: Tensor, col: Tensor, v: Tensor, p: Tensor) -> tuple[Tensor, ...]:
            square, dims = plus(abs_sq(g), epsilon), dims_of(p)
            if dims is None:
                v = lerp(v, square, rest)
                return g * torch.rsqrt(above_zero(v)), row, col, v
            d1, d0 = dims
            row = lerp(row, square.mean(d0), rest)
            col = lerp(col, square.mean(d1), rest)
            mean = row.mean(d1 - 1 if d1 > d0 else d1, keepdim=True)
            return (
                g
                * torch.rsqrt(above_zero(row / above_zero(mean))).unsqueeze(d0)
                * torch.rsqrt(above_zero(col)).unsqueeze(d1),
                row,
                col,
                v,
            )

        updates, (row, col, v) = leafwise_squares(step, updates, (state.v_row, state.v_col, state.v), params)
        return updates, FactoredState(state.count + 1, row, col, v)

    return GradientTransformation(init, update)


def adafactor(
    learning_rate: ScalarOrSchedule | None = None,
    min_dim_size_to_factor: int = 128,
    decay_rate: Scalar = 0.8,
    decay_offset: Scalar = 0,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: Scalar | None = 1.0,
    momentum: Scalar | None = None,
    dtype_momentum: torch.dtype = torch.float32,
    weight_decay_rate: ScalarOrSchedule | None = None,
    eps: Scalar = 1e-30,
    factored: bool = True,
    weight_decay_mask: MaskOrFn = None,
) -> GradientTransformationExtraArgs:
    """Adafactor: `scale_by_factored_rms`, clipped, relative to the parameters' size, averaged, decayed, downhill.

    >>> params, optimizer = torch.tensor([3.0, -4.0]), ft.optim.adafactor(0.1)
    >>> optimizer.update(torch.tensor([0.5, -0.01]), optimizer.init(params), params)[0]
    tensor([-0.3536,  0.3536])
    """
    parts = [scale_by_factored_rms(factored, decay_rate, decay_offset, min_dim_size_to_factor, eps)]
    if clipping_threshold is not None:
        parts.append(clip_by_block_rms(clipping_threshold))
    if learning_rate is not None:
        parts.append(scale_by_learning_rate(learning_rate, flip_sign=False))
    if multiply_by_parameter_scale:
        parts.append(scale_by_param_block_rms())
    if momentum is not None:
        parts.append(ema(momentum, debias=False, accumulator_dtype=dtype_momentum))
    if weight_decay_rate is not None:
        parts.append(add_decayed_weights(weight_decay_rate, weight_decay_mask))
    return chain(*parts, scale(-1))
