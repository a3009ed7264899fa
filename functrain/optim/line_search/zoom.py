"""Zoom line search: a learning rate with enough decrease and a small slope, by bracketing and interpolation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.line_search.values import ValueFn, bind, check_given, slope_along, violation
from functrain.optim.numerics.looping import while_loop
from functrain.optim.numerics.safe import device_of, like, working_dtype, zero_count
from functrain.optim.transformation import GradientTransformationExtraArgs, Updates, check_params, check_trainable
from functrain.schedules import Scalar
from functrain.transforms import value_and_grad
from functrain.tree import Params, Tree


class ZoomLinesearchInfo(NamedTuple):
    """How a search of `scale_by_zoom_linesearch` went."""

    num_linesearch_steps: Tensor  # (), int64: learning rates tried
    decrease_error: Tensor  # (), float: by how much the decrease is too small; 0 when it is enough
    curvature_error: Tensor  # (), float: by how much the slope is too large; 0 when it is small enough


class ScaleByZoomLinesearchState(NamedTuple):
    learning_rate: Tensor  # (), float: the one found
    value: Tensor  # (), float: the loss there
    grad: Tree  # like params: its gradient there
    info: ZoomLinesearchInfo


class _Point(NamedTuple):
    at: Tensor  # (): a learning rate
    value: Tensor  # (): the loss there
    slope: Tensor  # (): its derivative by the learning rate


class _Search(NamedTuple):
    tries: Tensor  # (), int64
    now: _Point
    grad: Tree
    decrease_error: Tensor
    curvature_error: Tensor
    bracketed: Tensor  # (), bool: low and high hold what is looked for between them
    done: Tensor  # (), bool
    failed: Tensor  # (), bool
    low: _Point  # the better end, which may be the right one
    high: _Point
    third: _Point  # a third point for the cubic
    safe: _Point  # the best with enough decrease so far
    safe_grad: Tree


def scale_by_zoom_linesearch(
    max_linesearch_steps: int,
    max_learning_rate: Scalar | None = None,
    tol: Scalar = 0.0,
    increase_factor: Scalar = 2.0,
    slope_rtol: Scalar = 1e-4,
    curv_rtol: Scalar = 0.9,
    approx_dec_rtol: Scalar | None = 1e-6,
    stepsize_precision: Scalar = 1e-5,
    initial_guess_strategy: str = "keep",
) -> GradientTransformationExtraArgs:
    """Multiply updates, a direction in which the loss falls, by a learning rate with enough decrease and a small slope.

    Enough: f(lr) <= f(0) + slope_rtol * lr * f'(0) + tol; near a minimum, where this drowns in rounding, also
    f'(lr) <= (2 * slope_rtol - 1) * f'(0) with f(lr) <= f(0) + approx_dec_rtol * |f(0)|, unless that is None. Small:
    |f'(lr)| <= curv_rtol * |f'(0)| + tol. First the rate grows by `increase_factor` from a guess, 1 for "one", the last
    one found for "keep", until two rates enclose a good one; then it is found by interpolation. When the interval is
    shorter than `stepsize_precision` or the steps are used up, the best rate with enough decrease is taken; without
    one, the last, or 0 where it has no finite value.

    The update takes `value`, `grad`, `value_fn(params)` and the keyword arguments of `value_fn`. Eagerly each try reads
    a number to the host; vmapped or compiled, all tries are made. Numbers are float32, or float64 where a leaf is.
    A search is not to be differentiated through: its decisions have no derivative. Equals
    `optax.scale_by_zoom_linesearch`.

    Source: Nocedal and Wright 1999, algorithms 3.5 and 3.6; Hager and Zhang 2006, equations 23, 26 and 27.

    Raises: ValueError for another strategy, and for an update without value, grad or value_fn; TypeError naming keyword
    arguments that `value_fn` does not take.

    >>> optimizer = ft.optim.chain(ft.optim.sgd(1.0), ft.optim.scale_by_zoom_linesearch(10))
    >>> fn, params = lambda params: torch.sum(params**2), torch.tensor([1.0])
    >>> given = {"value": fn(params), "grad": 2 * params, "value_fn": fn}
    >>> optimizer.update(2 * params, optimizer.init(params), params, **given)[0].round(decimals=3)
    tensor([-1.])
    """
    name = "scale_by_zoom_linesearch"
    if initial_guess_strategy not in ("one", "keep"):
        raise ValueError(f"{name}: choose initial_guess_strategy 'one' or 'keep', came {initial_guess_strategy!r}")

    def init(params: Params) -> ScaleByZoomLinesearchState:
        check_trainable(params)
        one = torch.ones((), dtype=working_dtype(params), device=device_of(params))
        infinite = [torch.full_like(one, torch.inf) for _ in range(3)]
        info = ZoomLinesearchInfo(zero_count(params), infinite[1], infinite[2])
        return ScaleByZoomLinesearchState(one, infinite[0], tree.zeros_like(params), info)

    def update(
        updates: Updates,
        state: ScaleByZoomLinesearchState,
        params: Params | None = None,
        *,
        value: Tensor | None = None,
        grad: Updates | None = None,
        value_fn: ValueFn | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, ScaleByZoomLinesearchState]:
        check_params(params, name)
        check_given(name, value=value, grad=grad, value_fn=value_fn)
        assert value_fn is not None and value is not None
        both = value_and_grad(bind(value_fn, extra_args, name))
        last = state.learning_rate
        start_value = torch.as_tensor(value, dtype=last.dtype, device=last.device)
        start = _Point(torch.zeros_like(last), start_value, slope_along(updates, grad).to(last.dtype))
        guess = torch.ones_like(last) if initial_guess_strategy == "one" else last

        def decrease_error(new: _Point) -> Tensor:
            error = new.value - start.value - like(slope_rtol, last) * new.at * start.slope
            if approx_dec_rtol is not None:
                near = new.value - start.value - like(approx_dec_rtol, last) * torch.abs(start.value)
                error = torch.minimum(
                    torch.maximum(new.slope - (2 * like(slope_rtol, last) - 1.0) * start.slope, near), error
                )
            return violation(error)

        def body(old: _Search) -> _Search:
            larger = torch.where(old.tries == 0, guess, like(increase_factor, last) * old.now.at)
            at_limit = torch.zeros_like(old.done)
            if max_learning_rate is not None:
                at_limit, larger = larger >= max_learning_rate, torch.clamp(larger, max=like(max_learning_rate, last))
            at = torch.where(old.bracketed, _between(old), larger).to(last.dtype)
            found, new_grad = both(tree.add_scale(params, at, updates))
            new = _Point(at, found.to(last.dtype), slope_along(updates, new_grad).to(last.dtype))
            decrease = decrease_error(new)
            curvature = violation(torch.abs(new.slope) - like(curv_rtol, last) * torch.abs(start.slope))
            # while bracketing the last point with enough decrease is kept, then the lowest
            better = (decrease <= tol) & (~old.bracketed | (new.value < old.safe.value))
            safe, safe_grad = tree.where(better, (new, new_grad), (old.safe, old.safe_grad))
            good = torch.maximum(decrease, curvature) <= tol
            bracket = _bracketing(old, new, decrease, good)
            zoomed = _zooming(old, new, decrease)
            bracketed, low, high, third = tree.where(old.bracketed, zoomed, bracket)
            # the largest rate allowed, and the loss still falls: nothing better is in reach
            done = good | (~old.bracketed & at_limit & ~bracket[0])
            used_up = old.tries + 1 >= max_linesearch_steps
            short = old.bracketed & (torch.abs(old.high.at - old.low.at) <= stepsize_precision) & (safe.at > 0)
            failed = (used_up | short) & ~done
            return _Search(
                old.tries + 1, new, new_grad, decrease, curvature, bracketed, done, failed, low, high, third, safe,
                safe_grad,
            )  # fmt: skip

        no, infinite = torch.zeros_like(last, dtype=torch.bool), torch.full_like(last, torch.inf)
        first = _Search(
            torch.zeros_like(state.info.num_linesearch_steps), start, grad, infinite, infinite, no, no, no,
            start, start, start, start, grad,
        )  # fmt: skip
        end = while_loop(lambda search: ~(search.done | search.failed), body, first, max_linesearch_steps)
        fall_back = end.failed & ((end.safe.at > 0) | torch.isinf(end.decrease_error))
        point, new_grad = tree.where(fall_back, (end.safe, end.safe_grad), (end.now, end.grad))
        info = ZoomLinesearchInfo(end.tries, end.decrease_error, end.curvature_error)
        return tree.scale(point.at, updates), ScaleByZoomLinesearchState(point.at, point.value, new_grad, info)

    return GradientTransformationExtraArgs(init, update)


def _bracketing(old: _Search, new: _Point, decrease: Tensor, good: Tensor) -> tuple[Tensor, _Point, _Point, _Point]:
    """Return whether the old and the new point enclose a good one, and (low, high, third): algorithm 3.5."""
    rises = (decrease > 0) | ((new.value >= old.now.value) & (old.tries > 0))
    turned = (new.slope >= 0) & ~rises
    low, high = tree.where(turned, (new, old.now), (old.now, new))
    return rises | turned | good, low, high, low


def _zooming(old: _Search, new: _Point, decrease: Tensor) -> tuple[Tensor, _Point, _Point, _Point]:
    """Return the part of the interval that holds a good point, and the end that is left out: algorithm 3.6."""
    worse = (decrease > 0) | (new.value >= old.low.value)
    flips = (new.slope * (old.high.at - old.low.at) >= 0) & ~worse
    high = tree.where(flips, old.low, tree.where(worse, new, old.high))
    low = tree.where(worse, old.low, new)
    third = tree.where(worse | flips, old.high, old.low)
    return old.bracketed, low, high, third


def _between(old: _Search) -> Tensor:
    """Return a point inside: the minimum of a cubic, of a parabola, or the middle, the first that is not at an end."""
    low, high, third = old.low, old.high, old.third
    width = torch.abs(high.at - low.at)
    left, right = torch.minimum(high.at, low.at), torch.maximum(high.at, low.at)
    cubic, parabola = _cubic_minimum(low, high, third), _parabola_minimum(low, high)
    cubic_fits = (cubic > left + 0.2 * width) & (cubic < right - 0.2 * width)
    parabola_fits = (parabola > left + 0.1 * width) & (parabola < right - 0.1 * width)
    middle = torch.where(parabola_fits, parabola, (low.at + high.at) / 2)
    return torch.where(cubic_fits, cubic, middle)


def _cubic_minimum(a: _Point, b: _Point, c: _Point) -> Tensor:
    """Return where the cubic through three points, with the slope of the first there, has a minimum; may be NaN."""
    to_b, to_c = b.at - a.at, c.at - a.at
    scale = (to_b * to_c) ** 2 * (to_b - to_c)
    above_b, above_c = b.value - a.value - a.slope * to_b, c.value - a.value - a.slope * to_c
    third = (to_c**2 * above_b - to_b**2 * above_c) / scale
    second = (to_b**3 * above_c - to_c**3 * above_b) / scale
    return a.at + (-second + torch.sqrt(second * second - 3 * third * a.slope)) / (3 * third)


def _parabola_minimum(a: _Point, b: _Point) -> Tensor:
    """Return where the parabola through two points, with the slope of the first there, has its minimum."""
    width = b.at - a.at
    second = (b.value - a.value - a.slope * width) / width**2
    return a.at - a.slope / (2 * second)
