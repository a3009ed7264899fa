"""Sophia: the average of gradients over that of the Hessian's diagonal, clipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import functrain.random as random
import functrain.tree as tree
from functrain.optim.combining import chain
from functrain.optim.decay import add_decayed_weights
from functrain.optim.masking import MaskOrFn
from functrain.optim.numerics.leafwise import leafwise
from functrain.optim.numerics.looping import when
from functrain.optim.numerics.moments import debias, update_moment, zero_moments
from functrain.optim.numerics.random_trees import random_like
from functrain.optim.numerics.safe import clamp, device_of, lerp, like, zero_count
from functrain.optim.scaling import scale_by_learning_rate
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    OptState,
    Updates,
    check_params,
    check_real,
    with_extra_args_support,
)
from functrain.schedules import Scalar, ScalarOrSchedule
from functrain.transforms import grad
from functrain.tree import Params, Tree


class HutchinsonState(NamedTuple):
    key: Tensor  # (2,), int32: the next key


class SophiaState(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far
    mu: Tree  # like params, in mu_dtype if given: first moment
    nu: Tree  # like params: average of the Hessian's diagonal
    hessian_fn_state: OptState


def hutchinson_estimator_diag_hessian(random_seed: Tensor | None = None) -> GradientTransformationExtraArgs:
    """Replace updates by an estimate of the diagonal of the Hessian of `obj_fn`, a keyword argument of the update.

    It is s times the product of the Hessian and s, a tree of random signs: without bias, and noisy. `obj_fn(params)`
    returns a () tensor. `random_seed` is a key, from which a leaf draws by its number among the leaves. Equals
    `optax.contrib.hutchinson_estimator_diag_hessian`.

    Raises: ValueError without params or `obj_fn`; TypeError naming the leaf that is complex.

    >>> tx, params = ft.optim.hutchinson_estimator_diag_hessian(), torch.tensor([1.0, 2.0])
    >>> obj_fn = lambda params: torch.sum(torch.tensor([1.0, 3.0]) * params**2)
    >>> tx.update(params, tx.init(params), params, obj_fn=obj_fn)[0]
    tensor([2., 6.])
    """

    def init(params: Params) -> HutchinsonState:
        check_real(params, "hutchinson_estimator_diag_hessian")
        key = random.key(0) if random_seed is None else random_seed.clone()
        return HutchinsonState(key.to(device_of(params)))

    def update(
        updates: Updates,
        state: HutchinsonState,
        params: Params | None = None,
        obj_fn: Callable[[Params], Tensor] | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, HutchinsonState]:
        check_params(params, "hutchinson_estimator_diag_hessian")
        if obj_fn is None:
            raise ValueError(
                "hutchinson_estimator_diag_hessian needs the loss as a function of params: call "
                "update(updates, state, params, obj_fn=lambda params: loss_fn(params, batch))"
            )
        objective = obj_fn
        key, subkey = random.split(state.key).unbind()
        signs = random_like(subkey, params, _rademacher)
        product = grad(lambda p: tree.vdot(grad(objective)(p), signs).real)(params)
        return tree.map(lambda h, s: (h * s).to(s.dtype), product, signs), HutchinsonState(key)

    return GradientTransformationExtraArgs(init, update)


def scale_by_sophia(
    b1: Scalar = 0.965,
    b2: Scalar = 0.99,
    eps: Scalar = 1e-8,
    gamma: Scalar = 0.01,
    clip_threshold: Scalar | None = 1.0,
    update_interval: int | Tensor = 10,
    hessian_diagonal_fn: GradientTransformation = hutchinson_estimator_diag_hessian(),  # noqa: B008
    mu_dtype: torch.dtype | None = None,
) -> GradientTransformationExtraArgs:
    """Rescale updates to mu / max(gamma * nu, eps), not above `clip_threshold` in size.

    Every `update_interval` updates, the diagonal that `hessian_diagonal_fn` makes of them, with the keyword arguments
    of the update, enters nu. Eagerly it is computed at those updates only; vmapped or compiled, at each.

    Source: Liu et al. 2023 (arXiv:2305.14342), algorithm 3.

    Raises: TypeError naming the leaf that is complex.

    >>> tx, params = ft.optim.scale_by_sophia(b1=0.0, b2=0.0, gamma=1.0), torch.tensor([1.0, 0.1])
    >>> obj_fn = lambda params: torch.sum(torch.tensor([1.0, 4.0]) * params**2)
    >>> _, state = tx.update(ft.grad(obj_fn)(params), tx.init(params), params, obj_fn=obj_fn)
    >>> tx.update(ft.grad(obj_fn)(params), state, params, obj_fn=obj_fn)[0]  # Newton's step
    tensor([1.0000, 0.1000])
    """
    hessian = with_extra_args_support(hessian_diagonal_fn)

    def init(params: Params) -> SophiaState:
        check_real(params, "scale_by_sophia")
        return SophiaState(
            zero_count(params), zero_moments(params, mu_dtype), zero_moments(params), hessian.init(params)
        )

    def update(
        updates: Updates, state: SophiaState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, SophiaState]:
        check_params(params, "scale_by_sophia")
        count = state.count + 1
        factor = debias(b1, count, updates)

        def step(g: Tensor, m: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            m = lerp(m, g, 1 - b1)
            ratio = like(factor, m) * m / torch.clamp(like(gamma, h) * h, min=like(eps, h))
            return ratio if clip_threshold is None else clamp(ratio, -clip_threshold, clip_threshold), m

        def look(carry: tuple[OptState, Tree]) -> tuple[OptState, Tree]:
            diagonal, hessian_state = hessian.update(updates, carry[0], params, **extra_args)
            return hessian_state, update_moment(diagonal, carry[1], b2, 1)

        new, (mu,) = leafwise(step, updates, (state.mu,), state.nu)
        due = state.count % update_interval == 0
        hessian_state, nu = when(due, look, (state.hessian_fn_state, state.nu))
        return new, SophiaState(count, mu, nu, hessian_state)

    return GradientTransformationExtraArgs(init, update)


def sophia(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.965,
    b2: Scalar = 0.99,
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 1e-4,
    weight_decay_mask: MaskOrFn = None,
    gamma: Scalar = 0.01,
    clip_threshold: Scalar | None = 1.0,
    update_interval: int | Tensor = 10,
    hessian_diagonal_fn: GradientTransformation = hutchinson_estimator_diag_hessian(),  # noqa: B008
    mu_dtype: torch.dtype | None = None,
) -> GradientTransformationExtraArgs:
    """Sophia: `scale_by_sophia`, with decoupled weight decay.

    Give the update `obj_fn=lambda params: loss_fn(params, batch)`.

    Source: Liu et al. 2023 (arXiv:2305.14342), algorithm 3, with signs in place of normal numbers in the estimate.

    >>> optimizer, params = ft.optim.sophia(0.1, weight_decay=0.0), torch.tensor([1.0, -2.0])
    >>> obj_fn = lambda params: torch.sum(params**2)
    >>> optimizer.update(ft.grad(obj_fn)(params), optimizer.init(params), params, obj_fn=obj_fn)[0]
    tensor([-0.1000,  0.1000])
    """
    return chain(
        scale_by_sophia(b1, b2, eps, gamma, clip_threshold, update_interval, hessian_diagonal_fn, mu_dtype),
        add_decayed_weights(weight_decay, weight_decay_mask),
        scale_by_learning_rate(learning_rate),
    )


def _rademacher(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Draw -1 or 1, as `jax.random.rademacher` does; in float64 as with x64."""
    width = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.where(random.uniform(key, shape, width) < 0.5, 1.0, -1.0).to(dtype)
