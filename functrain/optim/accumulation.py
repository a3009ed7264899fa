"""Updates gathered over several steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.numerics.leafwise import leafwise
from functrain.optim.numerics.moments import zero_moments
from functrain.optim.numerics.safe import (
    zero_count,
)
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    OptState,
    Updates,
    with_extra_args_support,
)
from functrain.schedules import Scalar
from functrain.tree import Params, Tree


class ApplyEvery(NamedTuple):
    """The state of `apply_every`."""

    count: Tensor  # type: ignore[assignment]  # (), int64: updates since the last that was let through
    grad_acc: Tree  # like params: their sum


def apply_every(k: int | Tensor = 1) -> GradientTransformation:
    """Add up k updates and let their sum through at the last of them; 0 at the others.

    >>> tx = ft.optim.apply_every(2)
    >>> first, state = tx.update(torch.tensor([1.0]), tx.init(torch.zeros(1)))
    >>> first, tx.update(torch.tensor([2.0]), state)[0]
    (tensor([0.]), tensor([3.]))
    """

    def init(params: Params) -> ApplyEvery:
        return ApplyEvery(zero_count(params), zero_moments(params))

    def update(updates: Updates, state: ApplyEvery, params: Params | None = None) -> tuple[Updates, ApplyEvery]:
        first, last = state.count % k == 0, state.count % k == k - 1

        def step(g: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
            total = torch.where(first, 0.0, total) + g
            return torch.where(last, total, 0.0), total

        updates, (total,) = leafwise(step, updates, (state.grad_acc,))
        return updates, ApplyEvery((state.count + 1) % k, total)

    return GradientTransformation(init, update)


class ShouldSkipUpdateFunction(Protocol):
    """Tell from updates whether to leave them out, as a () bool tensor, and what to remember of it."""

    def __call__(self, updates: Updates, gradient_step: Tensor, params: Params | None) -> tuple[Tensor, Tree]: ...


def skip_not_finite(updates: Updates, gradient_step: Tensor, params: Params | None) -> tuple[Tensor, Tree]:
    """Skip updates in which something is infinite or NaN.

    >>> optimizer = ft.optim.MultiSteps(ft.optim.sgd(0.1), 1, should_skip_update_fn=ft.optim.skip_not_finite)
    >>> optimizer.update(torch.tensor([float("nan"), 1.0]), optimizer.init(torch.zeros(2)))[0]
    tensor([0., 0.])
    """
    bad = [torch.sum(~torch.isfinite(g)) for g in tree.leaves(updates)]
    number = torch.stack(bad).sum() if bad else torch.zeros((), dtype=torch.int64)
    return number > 0, {"should_skip": number > 0, "num_not_finite": number}


def skip_large_updates(
    updates: Updates, gradient_step: Tensor, params: Params | None, max_squared_norm: Scalar
) -> tuple[Tensor, Tree]:
    """Skip updates whose squared norm is not below `max_squared_norm`; bind that with functools.partial.

    >>> from functools import partial
    >>> skip = partial(ft.optim.skip_large_updates, max_squared_norm=100.0)
    >>> optimizer = ft.optim.MultiSteps(ft.optim.sgd(0.1), 1, should_skip_update_fn=skip)
    >>> optimizer.update(torch.tensor([6.0, 80.0]), optimizer.init(torch.zeros(2)))[0]
    tensor([0., 0.])
    """
    square = tree.vdot(updates, updates).real
    skip = ~(square < max_squared_norm)
    return skip, {"should_skip": skip, "norm_squared": square}


class MultiStepsState(NamedTuple):
    mini_step: Tensor  # (), int64: updates since the inner transformation last took a step
    gradient_step: Tensor  # (), int64: steps of the inner transformation
    inner_opt_state: OptState
    acc_grads: Tree  # like params, in accumulator_dtype or longer: mean, or sum, of those updates
    skip_state: Tree = ()  # what the skip function remembers


class MultiSteps:
    """Average updates over k steps, then let the inner transformation take one; 0 at the others.

    Equals the inner transformation run every k steps on the mean of the updates, or their sum if not `use_grad_mean`.
    k may depend on the number of inner steps.

    >>> optimizer = ft.optim.MultiSteps(ft.optim.sgd(0.1), every_k_schedule=2)
    >>> first, state = optimizer.update(torch.tensor([1.0]), optimizer.init(torch.zeros(1)))
    >>> first, optimizer.update(torch.tensor([4.0]), state)[0]
    (tensor([0.]), tensor([-0.2500]))
    """

    def __init__(
        self,
        opt: GradientTransformation,
        every_k_schedule: int | Callable[[Tensor], Any],
        use_grad_mean: bool = True,
        should_skip_update_fn: ShouldSkipUpdateFunction | None = None,
        accumulator_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.inner_opt = with_extra_args_support(opt)
        self._every = every_k_schedule
        self._mean = use_grad_mean
        self._skip = should_skip_update_fn
        self._dtype = accumulator_dtype

    def init(self, params: Params) -> MultiStepsState:
        """Return the first state."""
        zero = zero_count(params)
        skip_state = () if self._skip is None else self._skip(tree.zeros_like(params), zero, params)[1]
        acc_grads = zero_moments(params, self._dtype)
        return MultiStepsState(zero, zero.clone(), self.inner_opt.init(params), acc_grads, skip_state)

    def update(
        self, updates: Updates, state: MultiStepsState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, MultiStepsState]:
        """Take one mini-step."""
        k = self._every(state.gradient_step) if callable(self._every) else self._every
        if not isinstance(k, Tensor) and k < 1:
            raise ValueError(f"MultiSteps: expected every_k_schedule of at least 1, came {k}")
        skip, skip_state = torch.zeros_like(state.mini_step, dtype=torch.bool), state.skip_state
        if self._skip is not None:
            skip, skip_state = self._skip(updates, state.gradient_step, params)
            if skip.dtype != torch.bool or skip.shape != ():
                raise ValueError(f"should_skip_update_fn: expected a () bool tensor, came {skip.shape} {skip.dtype}")
        emit = ~skip & (state.mini_step == k - 1)

        def gather(g: Tensor, acc: Tensor) -> tuple[Tensor, Tensor]:
            total = acc + ((g - acc) / (state.mini_step + 1) if self._mean else g)
            return total.to(g.dtype), torch.where(emit, 0.0, torch.where(skip, acc, total))

        gathered, (acc_grads,) = leafwise(gather, updates, (state.acc_grads,))
        new, inner_state = self.inner_opt.update(gathered, state.inner_opt_state, params, **extra_args)
        return tree.map(lambda u: torch.where(emit, u, 0.0), new, by_kind=True), MultiStepsState(
            torch.where(skip, state.mini_step, (state.mini_step + 1) % k),
            state.gradient_step + emit,
            tree.where(emit, inner_state, state.inner_opt_state),
            acc_grads,
            skip_state,
        )

    def has_updated(self, state: MultiStepsState) -> Tensor:
        """Tell whether the last mini-step let the inner transformation take a step."""
        return (state.mini_step == 0) & (state.gradient_step > 0)

    def gradient_transformation(self) -> GradientTransformationExtraArgs:
        """Return init and update as a transformation."""
        return GradientTransformationExtraArgs(self.init, self.update)
