"""Steps that must not count: which ones leave the state as it was, and when too many in a row end the run.

A guard is a pair of pure functions and its state a tree of tensors, as an optimizer is: `ft.train_step(..., guard=g)`
and `ft.init_state(..., guard=g)`. Nothing is read back to the host but by the hooks `stop_after` and `roll_back`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.optim.clipping.spikes import stands_out
from functrain.tree import Tree


class Guard(NamedTuple):
    """`init(device) -> state`, and `judge(state, loss, good) -> (keep, state)` after each step.

    The state has the fields of `SkipState`.
    """

    init: Callable[..., Any]
    judge: Callable[[Any, Tensor, Tensor], tuple[Tensor, Any]]


class SkipState(NamedTuple):
    skipped: Tensor  # (), int64: steps skipped in all
    in_row: Tensor  # (), int64: of them, the last ones without one between that was taken
    rolled_back: Tensor  # (), int64: times that the run went back to a checkpoint
    left_out: Tensor  # (), int64: batches that it left out by that: step t reads batch t + left_out


class SpikeState(NamedTuple):
    skipped: Tensor  # (), int64: steps skipped in all
    in_row: Tensor  # (), int64: of them, the last ones without one between that was taken
    rolled_back: Tensor  # (), int64: times that the run went back to a checkpoint
    left_out: Tensor  # (), int64: batches that it left out by that: step t reads batch t + left_out
    count: Tensor  # type: ignore[assignment]  # (), int64: steps taken
    losses: Tensor  # (window,), float32: the losses of the last of them, in a ring


def skip_nonfinite() -> Guard:
    """Skip a step whose loss or gradient holds an infinity or a NaN, or which would bring one into the state.

    The state is params, opt_state and buffers; a number of it that was not finite before does not count.

    >>> optimizer, guard = ft.optim.sgd(0.25), ft.train.skip_nonfinite()
    >>> step = ft.train_step(lambda params, x, key: (params["w"] - x) ** 2, optimizer, guard=guard)
    >>> state = ft.init_state({"w": torch.tensor(0.5)}, optimizer, key=ft.random.key(0), guard=guard)
    >>> state, metrics = step(state, torch.tensor(float("nan")))
    >>> state.step, state.params["w"], metrics["skipped"]
    (tensor(1), tensor(0.5000), tensor(1.))
    """

    def init(device: torch.device | str | None = None) -> SkipState:
        return SkipState(*_zeros(4, device))

    def judge(state: SkipState, loss: Tensor, good: Tensor) -> tuple[Tensor, SkipState]:
        return good, state._replace(**_counts(state, good))

    return Guard(init, judge)


def skip_spikes(window: int = 128, deviations: float = 6.0) -> Guard:
    """Skip a step that is not finite, or whose loss is a spike.

    A spike is more than so many standard deviations above the mean of the last `window` losses that were taken; none is
    one before half a window. A skipped loss enters no mean: where the loss stays high, every step is skipped, and
    `stop_after` ends the run.

    Raises: ValueError for a window below 2 or deviations that are not positive.

    >>> guard = ft.train.skip_spikes(window=4)  # for ft.train_step(..., guard=guard), which judges each loss by it
    >>> state, kept = guard.init(), []
    >>> for loss in [1.0, 1.1, 0.9, 1.0, 50.0, 1.0]:
    ...     keep, state = guard.judge(state, torch.tensor(loss), torch.tensor(True))
    ...     kept.append(bool(keep))
    >>> kept
    [True, True, True, True, False, True]
    """
    if type(window) is not int or window < 2:
        raise ValueError(f"skip_spikes: expected a window of at least 2 losses, came {window!r}")
    if not 0.0 < deviations < float("inf"):
        raise ValueError(f"skip_spikes: expected positive deviations, came {deviations!r}")

    def init(device: torch.device | str | None = None) -> SpikeState:
        skipped, in_row, rolled_back, left_out, count = _zeros(5, device)
        losses = torch.zeros(window, dtype=torch.float32, device=device)
        return SpikeState(skipped, in_row, rolled_back, left_out, count, losses)

    def judge(state: SpikeState, loss: Tensor, good: Tensor) -> tuple[Tensor, SpikeState]:
        places = torch.arange(window, device=loss.device)
        keep = good & ~stands_out(loss.float(), state.losses, state.count, deviations)
        losses = torch.where((places == state.count % window) & keep, loss.float(), state.losses)
        return keep, state._replace(**_counts(state, keep), count=state.count + keep, losses=losses)

    return Guard(init, judge)


def _zeros(count: int, device: torch.device | str | None) -> list[Tensor]:
    return [torch.zeros((), dtype=torch.int64, device=device) for _ in range(count)]


def _counts(state: SkipState | SpikeState, keep: Tensor) -> dict[str, Tensor]:
    return {"skipped": state.skipped + ~keep, "in_row": torch.where(keep, 0, state.in_row + 1)}


def is_overflow(before: Tree, after: Tree, loss: Tensor) -> Tensor:
    """Tell whether a step had gradients that were too large at the scale of a finite loss, which was made smaller.

    Below 1 no scale is the reason any more: what is not finite there counts, so that a run does not skip for ever.

    >>> from functrain.train.guard import is_overflow
    >>> scale = ft.loss_scale.dynamic(1024.0)
    >>> before = scale.init()
    >>> is_overflow(before, scale.update(before, finite=torch.tensor(False)), torch.tensor(2.0))
    tensor(True)
    """
    smaller: Tensor = after.scale < before.scale
    return smaller & (before.scale > 1.0) & torch.isfinite(loss)


class Diverged(ArithmeticError):
    """Too many steps in a row were skipped; `state` is the last one, whose params no skipped step has touched."""

    def __init__(self, step: int, in_row: int, state: Any, why: str = "") -> None:
        self.step, self.in_row, self.state = step, in_row, state
        super().__init__(
            f"step {step}: {in_row} steps in a row were skipped, as not finite or as spikes{why}; try a smaller "
            "learning rate or another precision, and go on from the last checkpoint"
        )


def stop_after(in_row: int, *, read_every: int = 1) -> Callable[[int, Tree, dict[str, Any]], None]:
    """Return a hook for `fit` that raises `Diverged` once so many steps in a row were skipped by the step's guard.

    It reads a number from the device after every `read_every` steps, which waits for the device: a row that ends in
    between is no reason to stop. Of the lanes of an `ft.sweep`, all must have such a row.

    Raises: ValueError for numbers below 1; from the hook, Diverged, and ValueError for a step without a guard.

    >>> hook = ft.train.stop_after(10)  # for ft.fit, whose step has a guard
    >>> hook(500, None, {"skipped_in_row": torch.tensor(10)})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    functrain.train.guard.Diverged: step 500: 10 steps in a row were skipped, ...
    """
    for name, value in (("in_row", in_row), ("read_every", read_every)):
        if type(value) is not int or value < 1:
            raise ValueError(f"stop_after: expected {name} of at least 1, came {value!r}")

    def hook(t: int, state: Tree, metrics: dict[str, Any]) -> None:
        if "skipped_in_row" not in metrics:
            came = ", ".join(metrics) or "none"
            raise ValueError(f"stop_after: expected a metric 'skipped_in_row', came {came}; give train_step a guard=")
        if t % read_every == 0 and (seen := int(metrics["skipped_in_row"].min())) >= in_row:
            raise Diverged(t, seen, state)

    return hook
