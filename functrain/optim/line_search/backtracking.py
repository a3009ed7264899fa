"""Backtracking line search: the learning rate shrinks until the loss has decreased enough."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.line_search.values import ValueFn, bind, check_given, slope_along, violation
from functrain.optim.numerics.looping import while_loop
from functrain.optim.numerics.safe import device_of, working_dtype, zero_count
from functrain.optim.transformation import GradientTransformationExtraArgs, Updates, check_params, check_trainable
from functrain.schedules import Scalar
from functrain.transforms import value_and_grad
from functrain.tree import Params, Tree


class BacktrackingLinesearchInfo(NamedTuple):
    num_linesearch_steps: Tensor  # (), int64: learning rates tried
    decrease_error: Tensor  # (), float: by how much the decrease is too small; 0 when it is enough


class ScaleByBacktrackingLinesearchState(NamedTuple):
    learning_rate: Tensor  # (), float: the one found
    value: Tensor  # (), float: the loss there
    grad: Tree | None  # like params: its gradient there; None without store_grad
    info: BacktrackingLinesearchInfo


class _Search(NamedTuple):
    tries: Tensor  # (), int64
    learning_rate: Tensor
    value: Tensor
    grad: Tree | None
    error: Tensor


def scale_by_backtracking_linesearch(
    max_backtracking_steps: int,
    slope_rtol: Scalar = 1e-4,
    decrease_factor: Scalar = 0.8,
    increase_factor: Scalar = 1.5,
    max_learning_rate: Scalar = 1.0,
    atol: Scalar = 0.0,
    rtol: Scalar = 0.0,
    store_grad: bool = False,
) -> GradientTransformationExtraArgs:
    """Multiply updates, a direction in which the loss decreases, by a learning rate that makes it decrease enough.

    It is the first of lr, lr * decrease_factor, ... with f(params + lr * updates) <= (1 + rtol) * f(params) +
    slope_rtol * lr * slope + atol; the first lr is `increase_factor` times the last one found, at most
    `max_learning_rate`. Where no lr gives a finite value it is 0. The update takes `value`, `grad`, `value_fn(params)`
    and the keyword arguments of `value_fn`. With `store_grad`, `value_and_grad_from_state` gives value and gradient at
    the new params. Eagerly each try reads a number to the host; vmapped or compiled, all tries are made. Numbers are
    float32, or float64 where a leaf is. Equals `optax.scale_by_backtracking_linesearch`.

    Source: Nocedal and Wright 1999, algorithm 3.1; Vaswani et al. 2019 (arXiv:1905.09997).

    >>> search = ft.optim.scale_by_backtracking_linesearch(10, decrease_factor=0.5)
    >>> fn, params = lambda params: torch.sum(params**2), torch.tensor([1.0])
    >>> given = {"value": fn(params), "grad": 2 * params, "value_fn": fn}
    >>> search.update(-8 * params, search.init(params), params, **given)[0]  # steps of -8, -4 and -2 are too long
    tensor([-1.])
    """

    def init(params: Params) -> ScaleByBacktrackingLinesearchState:
        check_trainable(params)
        one = torch.ones((), dtype=working_dtype(params), device=device_of(params))
        grad = tree.zeros_like(params) if store_grad else None
        info = BacktrackingLinesearchInfo(zero_count(params), torch.full_like(one, torch.inf))
        return ScaleByBacktrackingLinesearchState(one, torch.full_like(one, torch.inf), grad, info)

    def update(
        updates: Updates,
        state: ScaleByBacktrackingLinesearchState,
        params: Params | None = None,
        *,
        value: Tensor | None = None,
        grad: Updates | None = None,
        value_fn: ValueFn | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, ScaleByBacktrackingLinesearchState]:
        name = "scale_by_backtracking_linesearch"
        check_params(params, name)
        check_given(name, value=value, grad=grad, value_fn=value_fn)
        assert value_fn is not None and value is not None
        fn = bind(value_fn, extra_args, name)
        like = state.learning_rate
        start = torch.as_tensor(value, dtype=like.dtype, device=like.device)
        slope = slope_along(updates, grad).to(like.dtype)

        def body(search: _Search) -> _Search:
            rate = torch.where(search.tries > 0, decrease_factor * search.learning_rate, search.learning_rate)
            point = tree.add_scale(params, rate, updates)
            found, new_grad = value_and_grad(fn)(point) if store_grad else (fn(point), None)
            found = found.to(like.dtype)
            error = violation(found - (1.0 + rtol) * start - rate * slope_rtol * slope)
            return _Search(search.tries + 1, rate.to(like.dtype), found, new_grad, error.to(like.dtype))

        def go_on(search: _Search) -> Tensor:
            return ~(search.error <= atol)

        guess = torch.clamp(increase_factor * like, max=max_learning_rate).to(like.dtype)
        first = _Search(torch.zeros_like(state.info.num_linesearch_steps), guess, start, state.grad, start + torch.inf)
        search = while_loop(go_on, body, first, max_backtracking_steps + 1)
        # an infinite error: no finite value was found, and a step would spoil params
        rate = torch.where(torch.isinf(search.error), 0.0, search.learning_rate)
        info = BacktrackingLinesearchInfo(search.tries, search.error)
        return tree.scale(rate, updates), ScaleByBacktrackingLinesearchState(rate, search.value, search.grad, info)

    return GradientTransformationExtraArgs(init, update)
