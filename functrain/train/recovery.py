"""Going back: a run that skips step after step starts again from its last checkpoint, past the batches since."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Protocol

import torch

from functrain import checkpoint, tree
from functrain.sharding import Plan
from functrain.train.guard import Diverged, stop_after
from functrain.train.state import TrainState
from functrain.tree.reductions import finite

_log = logging.getLogger(__name__)


class Saves(Protocol):
    """The part of `checkpoint.every` that is used here."""

    plan: Plan | None

    def __call__(self, t: int, state: Any, metrics: Any, /) -> None: ...

    def due(self, t: int, metrics: Any, /) -> bool: ...

    def save(self, t: int, state: Any, /) -> Any: ...

    def end(self, t: int, /) -> None: ...

    def rewind(self, step: int, /) -> Path | None: ...


def roll_back(saves: Saves, *, after: int = 10, times: int = 3, skip: int = 0, read_every: int = 1) -> RollBack:
    """Return a hook for `fit` that saves, and that goes back once `after` steps in a row were skipped by the guard.

    It saves as `saves`, a hook of `checkpoint.every`, does; within a row of skipped steps only where the run stops.
    After such a row, `fit` goes on from the newest n-th checkpoint before it, with the batch after the row, or `skip`
    batches later. Equals a run whose data had none of the batches in between: step numbers, keys and learning rates are
    as there, and `state.guard.left_out` says by how much batches are ahead of steps. As it is in the state, so is it in
    every checkpoint: killed at any instant and started again, the run has the same bits.

    A checkpoint in which params are not finite, or the rest holds a NaN, is passed over with a warning and set aside.

    `times` is how often in all, `state.guard.rolled_back`. The row after that ends the run with `Diverged`, as does one
    with no checkpoint before it: for a way back from the first steps, `saves(0, state)` before `fit`. Each time is
    a warning through `logging`. Counts are read as by `stop_after(after, read_every=read_every)`.

    Source: the loss spikes of PaLM (arXiv:2204.02311, section 5.1), which went back 100 steps and left out 200 to 500
    batches.

    Raises: ValueError for numbers that cannot be; from the hook, Diverged, and ValueError for a step without a guard
    and for the lanes of a sweep.

    >>> from tempfile import TemporaryDirectory
    >>> optimizer, guard = ft.optim.sgd(0.25), ft.train.skip_nonfinite()
    >>> step = ft.train_step(lambda params, x, key: (params["w"] - x) ** 2, optimizer, guard=guard)
    >>> state = ft.init_state({"w": torch.tensor(0.0)}, optimizer, key=ft.random.key(0), guard=guard)
    >>> batches = torch.tensor([1.0, 1.0, float("nan"), float("nan"), 1.0, 1.0])
    >>> with TemporaryDirectory() as run:
    ...     hook = ft.train.roll_back(ft.checkpoint.every(1, run), after=2)
    ...     state = ft.fit(step, state, batches, steps=4, every=[hook])
    >>> state.params["w"], state.guard.left_out  # four halvings of the distance to 1, and two batches left out
    (tensor(0.9375), tensor(2))
    """
    for name, value in (("times", times), ("skip", skip)):
        if type(value) is not int or value < 0:
            raise ValueError(f"roll_back: expected {name} of at least 0, came {value!r}")
    return RollBack(saves, after, times, skip, read_every)


class RollBack:
    """The hook that `roll_back` returns."""

    def __init__(self, saves: Saves, after: int, times: int, skip: int, read_every: int) -> None:
        self._saves, self._times, self._skip = saves, times, skip
        self._stop = stop_after(after, read_every=read_every)

    def __call__(self, t: int, state: TrainState, metrics: Any) -> None:
        if state.step.dim() > 0:
            raise ValueError(
                "roll_back: expected the state of one run, came the lanes of a sweep, which share their batches; use "
                "stop_after"
            )
        self._stop(t, state, metrics)
        if self.due(t, metrics):
            self._saves(t, state, metrics)

    def due(self, t: int, metrics: Any) -> bool:
        """Tell whether a checkpoint is saved after step t."""
        return self._saves.due(t, metrics) and not torch.as_tensor(metrics.get("skipped_in_row", 0)).any()

    def end(self, t: int) -> None:
        self._saves.end(t)

    def save(self, t: int, state: TrainState) -> None:
        self._saves.save(t, state)

    def go_back(self, found: Diverged) -> TrainState:
        """Return the state to go on from.

        Raises: Diverged.
        """
        guard, t = found.state.guard, found.step
        before = int(guard.rolled_back)
        if before >= self._times:
            why = f", after going back {before} times" if before else ""
            raise Diverged(t, found.in_row, found.state, why)
        state = self._newest_good(found)
        start = int(state.step)
        left_out = t + int(guard.left_out) + self._skip - start
        _log.warning(
            "step %d: %d steps in a row were skipped; going back to step %d, from batch %d on (%d of %d times)",
            *(t, found.in_row, start, start + left_out, before + 1, self._times),
        )
        counts = {"rolled_back": torch.full_like(guard.rolled_back, before + 1)}
        counts["left_out"] = torch.full_like(guard.left_out, left_out)
        return state._replace(guard=state.guard._replace(**counts))

    def _newest_good(self, found: Diverged) -> TrainState:
        before, passed = found.step - found.in_row, ""
        while (path := self._saves.rewind(before)) is not None:
            state: TrainState = checkpoint.load(path, like=found.state, plan=self._saves.plan)
            if _good(state):
                return state
            _log.warning("%s: its params, or what else is trained, are not finite; passing over it", path)
            before, passed = int(state.step) - 1, " whose params are finite"
        raise Diverged(found.step, found.in_row, found.state, f", with no checkpoint before them{passed} to go back to")


def _good(state: TrainState) -> bool:
    # a best loss, say, may be infinite in the state of an optimizer; NaN is nothing to go on from
    rest = tree.leaves((state.opt_state, state.buffers))
    return bool(finite(state.params)) and not any(bool(torch.isnan(leaf).any()) for leaf in rest)
