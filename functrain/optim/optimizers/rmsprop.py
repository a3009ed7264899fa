"""RMSProp: updates over the root of the average of their squares."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from functrain.optim.averaging import trace
from functrain.optim.combining import chain
from functrain.optim.numerics.leafwise import by_parts, leafwise_squares
from functrain.optim.numerics.moments import debias, full_parts, zero_moments
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
    OptState,
    Updates,
    identity,
)
from functrain.schedules import Scalar, ScalarOrSchedule
from functrain.tree import Params, Tree


class ScaleByRmsState(NamedTuple):
    nu: Tree  # like params: average of squares


class ScaleByRmsWithCountState(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far
    nu: Tree  # like params: average of squares


class ScaleByRStdDevState(NamedTuple):
    mu: Tree  # like params: average
    nu: Tree  # like params: average of squares


class ScaleByRStdDevWithCountState(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far
    mu: Tree  # like params: average
    nu: Tree  # like params: average of squares


def scale_by_rms(
    decay: Scalar = 0.9,
    eps: Scalar = 1e-8,
    initial_scale: Scalar = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
) -> GradientTransformation:
    """Divide updates by their root mean square over time.

    `scale_by_rms(b2, eps_in_sqrt=False, bias_correction=True)` equals `scale_by_adam(b1=0, b2=b2)`.

    A complex leaf is taken for two real ones, as `torch.optim` does.

    Source: Tieleman and Hinton 2012, lecture 6.5.

    >>> tx = ft.optim.scale_by_rms(decay=0.75)
    >>> tx.update(torch.tensor([3.0, -0.5]), tx.init(torch.zeros(2)))[0]
    tensor([ 2., -2.])
    """

    def init(params: Params) -> OptState:
        nu = full_parts(params, initial_scale)
        return ScaleByRmsWithCountState(zero_count(params), nu) if bias_correction else ScaleByRmsState(nu)

    def update(updates: Updates, state: OptState, params: Params | None = None) -> tuple[Updates, OptState]:
        count = state.count + 1 if bias_correction else None
        factor = 1.0 if count is None else debias(decay, count, updates)

        def step(g: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            v = lerp_over(v, abs_sq(g), 1 - decay)
            nu_hat = v if count is None else like(factor, v) * v
            return _over_root(g, nu_hat, eps, eps_in_sqrt), v

        updates, (nu,) = leafwise_squares(by_parts(step), updates, (state.nu,))
        return updates, ScaleByRmsState(nu) if count is None else ScaleByRmsWithCountState(count, nu)

    return GradientTransformation(init, update)


def scale_by_stddev(
    decay: Scalar = 0.9,
    eps: Scalar = 1e-8,
    initial_scale: Scalar = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
) -> GradientTransformation:
    """Divide updates by their standard deviation over time.

    A variance that rounding makes negative counts as 0; optax takes its root there, NaN.

    A complex leaf is taken for two real ones, as `torch.optim` does.

    Source: Graves 2013 (arXiv:1308.0850), equations 38 to 41.

    >>> tx = ft.optim.scale_by_stddev(decay=0.5)
    >>> tx.update(torch.tensor([3.0, -0.5]), tx.init(torch.zeros(2)))[0]
    tensor([ 2., -2.])
    """

    def init(params: Params) -> OptState:
        mu, nu = zero_moments(params), full_parts(params, initial_scale)
        return (
            ScaleByRStdDevWithCountState(zero_count(params), mu, nu) if bias_correction else ScaleByRStdDevState(mu, nu)
        )

    def update(updates: Updates, state: OptState, params: Params | None = None) -> tuple[Updates, OptState]:
        count = state.count + 1 if bias_correction else None
        factor = 1.0 if count is None else debias(decay, count, updates)

        def step(g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            m = lerp(m, g, 1 - decay)
            v = lerp_over(v, abs_sq(g), 1 - decay)
            mu_hat, nu_hat = (m, v) if count is None else (like(factor, m) * m, like(factor, v) * v)
            return _over_root(g, torch.clamp(nu_hat - abs_sq(mu_hat), min=0.0), eps, eps_in_sqrt), m, v

        updates, (mu, nu) = leafwise_squares(by_parts(step), updates, (state.mu, state.nu))
        new = ScaleByRStdDevState(mu, nu) if count is None else ScaleByRStdDevWithCountState(count, mu, nu)
        return updates, new

    return GradientTransformation(init, update)


def rmsprop(
    learning_rate: ScalarOrSchedule,
    decay: Scalar = 0.9,
    eps: Scalar = 1e-8,
    initial_scale: Scalar = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: Scalar | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
) -> GradientTransformationExtraArgs:
    """RMSProp: `scale_by_rms`, or `scale_by_stddev` if centered, minus the learning rate, then `trace`.

    Equals `torch.optim.RMSprop` with `eps_in_sqrt=False`.

    >>> optimizer, params = ft.optim.rmsprop(0.1, decay=0.75), torch.zeros(2)
    >>> optimizer.update(torch.tensor([3.0, -0.5]), optimizer.init(params), params)[0]
    tensor([-0.2000,  0.2000])
    """
    rescale = scale_by_stddev if centered else scale_by_rms
    return chain(
        rescale(decay, eps, initial_scale, eps_in_sqrt, bias_correction),
        scale_by_learning_rate(learning_rate),
        identity() if momentum is None else trace(momentum, nesterov),
    )


def _over_root(g: Tensor, square: Tensor, eps: Scalar, eps_in_sqrt: bool) -> Tensor:
    return (
        g * torch.rsqrt(above_zero(plus(square, eps))) if eps_in_sqrt else g / plus(torch.sqrt(above_zero(square)), eps)
    )
