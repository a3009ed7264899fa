"""L-BFGS: gradients times an inverse Hessian that the last steps tell."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.combining import chain
from functrain.optim.line_search.zoom import scale_by_zoom_linesearch
from functrain.optim.numerics.safe import device_of, working_dtype, zero_count
from functrain.optim.scaling import scale, scale_by_learning_rate
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    Updates,
    check_params,
    check_trainable,
    identity,
)
from functrain.schedules import ScalarOrSchedule
from functrain.tree import Params, Tree


class ScaleByLBFGSState(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far
    params: Tree  # like params: the last ones
    updates: Tree  # like params: the last gradients
    diff_params_memory: Tree  # like params, (memory_size, *shape): the last differences of params, in a ring
    diff_updates_memory: Tree  # like params, (memory_size, *shape): those of gradients
    weights_memory: Tensor  # (memory_size,): 1 / (difference of params · difference of gradients)


def scale_by_lbfgs(memory_size: int = 10, scale_init_precond: bool = True) -> GradientTransformation:
    """Multiply gradients by the inverse Hessian that the last `memory_size` differences of them and of params make.

    `scale_init_precond` starts from the identity times the last curvature, at the first step, and where there is none,
    times min(1, 1 / norm of the gradient). Equals `optax.scale_by_lbfgs`.

    Source: Nocedal and Wright 1999, algorithms 7.4 and 7.5.

    Raises: ValueError for a memory below 1.

    >>> tx, params = ft.optim.scale_by_lbfgs(), torch.tensor([1.0])
    >>> _, state = tx.update(8 * params, tx.init(params), params)
    >>> tx.update(torch.tensor([4.0]), state, torch.tensor([0.5]))[0]  # 4 divided by the second derivative, 8
    tensor([0.5000])
    """
    if memory_size < 1:
        raise ValueError(f"scale_by_lbfgs: expected a memory_size of at least 1, came {memory_size}")

    def init(params: Params) -> ScaleByLBFGSState:
        check_trainable(params)
        memory = tree.map(lambda p: p.new_zeros((memory_size, *p.shape)), params)
        weights = torch.zeros(memory_size, dtype=working_dtype(params), device=device_of(params))
        zeros = tree.zeros_like(params)
        again = tree.map(torch.clone, memory)
        return ScaleByLBFGSState(zero_count(params), zeros, tree.zeros_like(params), memory, again, weights)

    def update(
        updates: Updates, state: ScaleByLBFGSState, params: Params | None = None
    ) -> tuple[Updates, ScaleByLBFGSState]:
        check_params(params, "scale_by_lbfgs")
        # the first update has nothing to take differences from
        later = state.count > 0
        dp = _or_zero(later, tree.sub(params, state.params))
        du = _or_zero(later, tree.sub(updates, state.updates))
        curvature = tree.vdot(du, dp).real
        # below the smallest normal number its inverse is infinite: what has converged has no curvature
        none = torch.abs(curvature) < torch.finfo(curvature.dtype).tiny
        curvature = torch.where(none, 0.0, curvature)
        weight = torch.where(none, 0.0, 1 / torch.where(none, 1.0, curvature))
        slot = (state.count - 1) % memory_size
        here = torch.arange(memory_size, device=slot.device) == slot  # (memory_size,)
        dps, dus = (
            tree.map(lambda memory, new: torch.where(_column(here, memory), new, memory), *pair)
            for pair in ((state.diff_params_memory, dp), (state.diff_updates_memory, du))
        )
        weights = torch.where(here, weight.to(state.weights_memory.dtype), state.weights_memory)
        new = _precondition(updates, dps, dus, weights, _first_scale(updates, du, curvature, later), state.count)
        # copies: a caller may write to its params and gradients
        last, last_updates = tree.map(torch.clone, params), tree.map(torch.clone, updates)
        return new, ScaleByLBFGSState(state.count + 1, last, last_updates, dps, dus, weights)

    def _first_scale(updates: Updates, du: Tree, curvature: Tensor, later: Tensor) -> Tensor:
        if not scale_init_precond:
            return torch.ones_like(curvature)
        square, size = tree.vdot(du, du).real, tree.norm(du)
        normal = torch.isfinite(square) & (square >= torch.finfo(square.dtype).tiny)
        by_square = curvature / torch.where(normal, square, 1.0)
        by_size = curvature / torch.where(size > 0, size, 1.0) / torch.where(size > 0, size, 1.0)
        known = later & (curvature != 0)
        first = torch.clamp(1 / tree.norm(tree.map(torch.detach, updates)), max=1.0)
        return torch.where(known, torch.where(normal, by_square, by_size), first)

    return GradientTransformation(init, update)


def lbfgs(
    learning_rate: ScalarOrSchedule | None = None,
    memory_size: int = 10,
    scale_init_precond: bool = True,
    linesearch: GradientTransformation | None = scale_by_zoom_linesearch(  # noqa: B008
        max_linesearch_steps=20, initial_guess_strategy="one"
    ),
) -> GradientTransformationExtraArgs:
    """L-BFGS: `scale_by_lbfgs`, minus the learning rate or -1, and a line search, or none.

    With a line search, call `update(grad, state, params, value=value, grad=grad, value_fn=fn)`;
    `value_and_grad_from_state(fn)` spares the gradient that the search has computed.

    Source: Nocedal and Wright 1999, algorithm 7.5.

    >>> fn, params = lambda x: torch.sum(torch.tensor([1.0, 10.0]) * (x - 3.0) ** 2), torch.zeros(2)
    >>> optimizer, value_and_grad = ft.optim.lbfgs(), ft.optim.value_and_grad_from_state(fn)
    >>> state = optimizer.init(params)
    >>> for _ in range(10):
    ...     value, grad = value_and_grad(params, state=state)
    ...     updates, state = optimizer.update(grad, state, params, value=value, grad=grad, value_fn=fn)
    ...     params = ft.optim.apply_updates(params, updates)
    >>> params.round(decimals=3)
    tensor([3., 3.])
    """
    return chain(
        scale_by_lbfgs(memory_size, scale_init_precond),
        scale(-1.0) if learning_rate is None else scale_by_learning_rate(learning_rate),
        identity() if linesearch is None else linesearch,
    )


def _precondition(
    updates: Updates, dps: Tree, dus: Tree, weights: Tensor, first_scale: Tensor, count: Tensor
) -> Updates:
    """Run the two loops of algorithm 7.4, from the newest difference to the oldest and back."""
    size = weights.shape[0]
    order = [(count + age) % size for age in range(size)]  # slots by age, the oldest first
    rows = [(_pick(weights, i), _pick_tree(dps, i), _pick_tree(dus, i)) for i in order]
    alphas = []
    for weight, dp, du in reversed(rows):
        alpha = _times(weight, tree.vdot(dp, updates).real)
        updates = tree.add_scale(updates, -alpha, du)
        alphas.append(alpha)
    updates = tree.scale(first_scale, updates)
    for (weight, dp, du), alpha in zip(rows, reversed(alphas), strict=True):
        beta = _times(weight, tree.vdot(du, updates).real)
        updates = tree.add_scale(updates, alpha - beta, dp)
    return updates


def _times(weight: Tensor, product: Tensor) -> Tensor:
    # a difference that does not count may have an infinite product
    return torch.where(weight == 0, 0.0, weight * product)


def _pick(memory: Tensor, index: Tensor) -> Tensor:
    # not memory[index]: the host would read the index, which may be a lane of a vmap
    return torch.index_select(memory, 0, index.reshape(1)).squeeze(0)


def _pick_tree(memory: Tree, index: Tensor) -> Tree:
    return tree.map(lambda leaf: _pick(leaf, index), memory)


def _column(where: Tensor, memory: Tensor) -> Tensor:
    return where.reshape(-1, *[1] * (memory.dim() - 1))


def _or_zero(when: Tensor, values: Tree) -> Tree:
    return tree.map(lambda x: torch.where(when, x, 0.0), values)
