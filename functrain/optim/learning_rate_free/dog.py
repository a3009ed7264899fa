"""DoG and DoWG: a step as long as the way from the start."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.combining import chain
from functrain.optim.decay import add_decayed_weights
from functrain.optim.masking import MaskOrFn
from functrain.optim.numerics.leafwise import leafwise
from functrain.optim.numerics.moments import accumulator_dtype, moment_dtype
from functrain.optim.numerics.safe import (
    abs_sq,
    device_of,
    largest_squared,
    like,
    plus,
    scaled,
    shrunk,
    working_dtype,
)
from functrain.optim.scaling import scale_by_learning_rate
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    Updates,
    check_params,
    check_trainable,
    identity,
)
from functrain.schedules import Scalar, ScalarOrSchedule
from functrain.tree import Params, Tree
from functrain.tree.reductions import length, real_dtype


class ScaleByDistanceOverGradientsState(NamedTuple):
    max_dist: Tree  # () for each leaf of params: the farthest that it was from its start
    grad_sum_of_squares: Tree  # (1,) for each leaf of params
    init_params: Tree  # like params, in param_dtype or longer: where they started


def scale_by_distance_over_gradients(
    reps_rel: Scalar = 1e-6,
    eps: Scalar = 1e-8,
    param_dtype: torch.dtype = torch.float32,
    global_scale: Scalar = 1.0,
) -> GradientTransformation:
    """Rescale each leaf by its distance from the start over the root of the sum of squared gradients.

    Source: Ivgi et al. 2023 (arXiv:2302.12022), layer-wise.

    Raises: ValueError without params.

    >>> tx, params = ft.optim.scale_by_distance_over_gradients(reps_rel=0.1), torch.tensor([3.0, 4.0])
    >>> tx.update(torch.tensor([0.0, 2.0]), tx.init(params), params)[0]
    tensor([0.0000, 0.6000])
    """

    def init(params: Params) -> ScaleByDistanceOverGradientsState:
        check_trainable(params)
        # float32 at least: a sum of squares in bfloat16 soon stops growing
        wide = tree.map(lambda p: p.new_zeros(1, dtype=real_dtype(torch.promote_types(p.dtype, torch.float32))), params)
        return ScaleByDistanceOverGradientsState(
            tree.map(lambda p: (like(reps_rel, p) * (1 + length(p))).to(real_dtype(moment_dtype(p))), params),
            wide,
            tree.map(lambda p: p.to(accumulator_dtype(p, param_dtype), copy=True), params),
        )

    def update(
        updates: Updates, state: ScaleByDistanceOverGradientsState, params: Params | None = None
    ) -> tuple[Updates, ScaleByDistanceOverGradientsState]:
        check_params(params, "scale_by_distance_over_gradients")

        def step(g: Tensor, farthest: Tensor, squares: Tensor, p: Tensor, start: Tensor) -> tuple[Tensor, ...]:
            farthest = torch.maximum(farthest, length(p - start))
            g = shrunk(g, length(g))
            squares = squares + torch.sum(abs_sq(g))
            rate = like(global_scale, squares) * (farthest / torch.sqrt(plus(squares, eps)))
            return rate.reshape(()).to(g.dtype) * g, farthest, squares

        updates, (farthest, squares) = leafwise(
            step, updates, (state.max_dist, state.grad_sum_of_squares), params, state.init_params
        )
        return updates, ScaleByDistanceOverGradientsState(farthest, squares, state.init_params)

    return GradientTransformation(init, update)


class DoGState(NamedTuple):
    is_init_step: Tensor  # (), bool
    init_params: Params  # a copy of the first params
    max_dist: Tensor  # (): the farthest that all params together were from there
    sum_sq_norm_grads: Tensor  # ()


class DoWGState(NamedTuple):
    init_params: Params  # a copy of the first params
    weighted_sq_norm_grads: Tensor  # ()
    estim_sq_dist: Tensor  # (): the largest squared distance so far


InitStep: TypeAlias = tuple[Literal["distance", "learning_rate", "heuristic"], Scalar]


def scale_by_dog(init_step: InitStep, eps: Scalar = 1e-8) -> GradientTransformation:
    """Rescale updates by the distance of all params from their start over the root of the sum of squared gradients.

    The first step has ("distance", d): that distance; ("heuristic", r): r * (1 + norm of params); ("learning_rate", r):
    that rate.

    Source: Ivgi et al. 2023 (arXiv:2302.12022), algorithm 1.

    Raises: ValueError for a first step of another kind, and without params.

    >>> tx, params = ft.optim.scale_by_dog(("distance", 0.5)), torch.tensor([3.0, 4.0])
    >>> tx.update(torch.tensor([6.0, 8.0]), tx.init(params), params)[0]  # scaled to norm 0.5
    tensor([0.3000, 0.4000])
    """
    how, value = init_step
    if how not in ("distance", "learning_rate", "heuristic"):
        raise ValueError(f"scale_by_dog: init_step must be 'distance', 'heuristic' or 'learning_rate', came {how!r}")

    def init(params: Params) -> DoGState:
        zero = torch.zeros((), dtype=working_dtype(params), device=device_of(params))
        first = {"distance": value, "learning_rate": 0.0, "heuristic": value * (1 + tree.norm(params))}[how]
        start = torch.ones_like(zero, dtype=torch.bool)
        return DoGState(start, tree.map(torch.clone, params), zero + first, zero.clone())

    def update(updates: Updates, state: DoGState, params: Params | None = None) -> tuple[Updates, DoGState]:
        check_params(params, "scale_by_dog")
        farthest = torch.maximum(state.max_dist, tree.norm(tree.sub(state.init_params, params)))
        norm = tree.norm(updates)
        updates = tree.map(lambda g: shrunk(g, norm), updates, by_kind=True)
        squares = state.sum_sq_norm_grads + torch.clamp(norm, max=largest_squared(norm)) ** 2
        rate = farthest / torch.sqrt(plus(squares, eps))
        if how == "learning_rate":
            rate = torch.where(state.is_init_step, value, rate)
        new = tree.map(lambda g: scaled(g, rate), updates, by_kind=True)
        return new, DoGState(torch.zeros_like(state.is_init_step), state.init_params, farthest, squares)

    return GradientTransformation(init, update)


def dog(
    learning_rate: ScalarOrSchedule = 1.0,
    init_step: InitStep = ("heuristic", 1e-6),
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule | None = None,
    mask: MaskOrFn = None,
) -> GradientTransformationExtraArgs:
    """DoG: weight decay into the gradient, `scale_by_dog`, then minus the learning rate.

    >>> optimizer, params = ft.optim.dog(init_step=("learning_rate", 0.1)), torch.tensor([3.0, 4.0])
    >>> optimizer.update(torch.tensor([6.0, 8.0]), optimizer.init(params), params)[0]
    tensor([-0.6000, -0.8000])
    """
    decay = identity() if weight_decay is None else add_decayed_weights(weight_decay, mask)
    return chain(decay, scale_by_dog(init_step, eps), scale_by_learning_rate(learning_rate))


def scale_by_dowg(init_estim_sq_dist: Scalar | None = None, eps: Scalar = 1e-4) -> GradientTransformation:
    """Rescale updates by the squared distance from the start over the root of the sum of gradients weighted by it.

    The first distance is `init_estim_sq_dist`, without it eps.

    Source: Khaled et al. 2023 (arXiv:2305.16284), algorithm 1.

    Raises: ValueError without params.

    >>> tx, params = ft.optim.scale_by_dowg(init_estim_sq_dist=0.25), torch.tensor([3.0, 4.0])
    >>> tx.update(torch.tensor([6.0, 8.0]), tx.init(params), params)[0]
    tensor([0.3000, 0.4000])
    """

    def init(params: Params) -> DoWGState:
        zero = torch.zeros((), dtype=working_dtype(params), device=device_of(params))
        first = eps if init_estim_sq_dist is None else init_estim_sq_dist
        return DoWGState(tree.map(torch.clone, params), zero, zero + like(first, zero))

    def update(updates: Updates, state: DoWGState, params: Params | None = None) -> tuple[Updates, DoWGState]:
        check_params(params, "scale_by_dowg")
        way, norm = tree.norm(tree.sub(state.init_params, params)), tree.norm(updates)
        updates = tree.map(lambda g: shrunk(g, norm), updates, by_kind=True)
        most = largest_squared(norm)
        square = torch.maximum(state.estim_sq_dist, torch.clamp(way, max=most) ** 2)
        weighted = square * torch.clamp(norm, max=most) ** 2 + state.weighted_sq_norm_grads
        weighted = torch.clamp(weighted, max=most**2)
        rate = square / plus(torch.sqrt(weighted), eps)
        return tree.map(lambda g: scaled(g, rate), updates, by_kind=True), DoWGState(
            state.init_params, weighted, square
        )

    return GradientTransformation(init, update)


def dowg(
    learning_rate: ScalarOrSchedule = 1.0,
    init_estim_sq_dist: Scalar | None = None,
    eps: Scalar = 1e-4,
    weight_decay: ScalarOrSchedule | None = None,
    mask: MaskOrFn = None,
) -> GradientTransformationExtraArgs:
    """DoWG: weight decay into the gradient, `scale_by_dowg`, then minus the learning rate.

    >>> optimizer, params = ft.optim.dowg(init_estim_sq_dist=0.25), torch.tensor([3.0, 4.0])
    >>> optimizer.update(torch.tensor([6.0, 8.0]), optimizer.init(params), params)[0]
    tensor([-0.3000, -0.4000])
    """
    decay = identity() if weight_decay is None else add_decayed_weights(weight_decay, mask)
    return chain(decay, scale_by_dowg(init_estim_sq_dist, eps), scale_by_learning_rate(learning_rate))
