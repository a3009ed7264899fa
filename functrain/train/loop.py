"""The loop around a step: batches in, hooks after each step, and a signal that loses no finished step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeAlias

import torch

from functrain import data
from functrain.train.state import TrainState
from functrain.tree import Batch

Metrics: TypeAlias = dict[str, Any]
Step: TypeAlias = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
Hook: TypeAlias = Callable[[int, TrainState, Metrics], None]

STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):
    """A signal stopped `fit` after a finished step: `state` is the state after it, `signum` the signal.

    It is a SystemExit so that a script that does not catch it ends with the shell's code for the signal: 130 after
    SIGINT, 143 after SIGTERM.
    """

    def __init__(self, signum: int, state: TrainState) -> None:
        super().__init__(128 + signum)
        self.signum = signum
        self.state = state

    def __str__(self) -> str:
        return f"{signal.Signals(self.signum).name} stopped training after step {_done(self.state)}"


def fit(step: Step, state: TrainState, batches: Any, *, steps: int, every: Sequence[Hook] = ()) -> TrainState:
    """Run `step` from step `state.step` to `steps`, and every hook after each step.

    Equals `for t in range(state.step, steps): state, metrics = step(state, batches[t])`, with `hook(t + 1, state,
    metrics)` for each hook in the loop. Batches that can be indexed are read ahead in a thread and moved to
    the state's device; an iterator is advanced once a step. Only hooks read metrics: nothing else waits for a device.
    The states of an `ft.sweep` are a state here, with a step for each lane.

    Where a hook has a method `save`, as that of `checkpoint.every` has, `hook.save(t, state)` is called when the loop
    stops, after all steps or after a signal. On SIGINT or SIGTERM the running step ends, its hooks and `save` run, and
    `Interrupted` is raised. A second SIGINT in the same step gives that step up (KeyboardInterrupt, the last checkpoint
    stands); while hooks run, every further signal waits. Handlers are set in the main thread only, and put back.

    Raises: Interrupted; ValueError if the state is past `steps`, or the batches are fewer.
    """
    start = _done(state)
    if start > steps:
        raise ValueError(f"fit: the state has done {start} steps, more than steps={steps}; ask for at least {start}")
    t, metrics = start, dict[str, Any]()
    with _Signals() as signals, _read(batches, start, steps, state.key.device) as source:
        while t < steps and signals.first is None:
            batch = next(source, _END)
            if batch is _END or signals.first is not None:
                break
            with signals.second_sigint_raises():
                state, metrics = step(state, batch)
            t += 1
            for hook in every:
                hook(t, state, metrics)
        if t > start:
            for hook in every:
                if hasattr(hook, "save"):
                    hook.save(t, state)
    if signals.first is not None:
        raise Interrupted(signals.first, state)
    if t < steps:
        raise ValueError(f"fit: the batches ended after step {t}, before steps={steps}; give more, or ask for fewer")
    return state


def every(n: int, fn: Hook) -> Hook:
    """Return a hook that calls `fn` when the number of steps done is a multiple of `n`; a method `save` is kept.

    Raises: ValueError if `n` is not positive.
    """
    if n < 1:
        raise ValueError(f"every: expected n of at least 1, came {n}")

    def hook(t: int, state: TrainState, metrics: Metrics) -> None:
        if t % n == 0:
            fn(t, state, metrics)

    if hasattr(fn, "save"):
        hook.save = fn.save  # type: ignore[attr-defined]
    return hook


_END = object()


def _done(state: TrainState) -> int:
    return int(state.step.reshape(-1)[0])  # the lanes of a sweep have all done as many


@contextmanager
def _read(batches: Any, start: int, stop: int, device: torch.device) -> Generator[Iterator[Batch]]:
    if not hasattr(batches, "__getitem__"):
        # the caller's own iterator: it stays open, a next call goes on from it
        yield iter(batches)
        return
    if hasattr(batches, "__len__") and len(batches) < stop:
        raise ValueError(f"fit: {len(batches)} batches for steps={stop}; give more, or ask for fewer")
    source = data.prefetch(batches, start, stop, device=None if device.type == "cpu" else device)
    try:
        yield source
    finally:
        if isinstance(source, Generator):
            source.close()  # ends the thread


class _Signals:
    """Remember the first stopping signal while the block runs, in the main thread; elsewhere do nothing."""

    def __init__(self) -> None:
        self.first: int | None = None
        self._in_step = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for signum in STOPPING_SIGNALS:
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            # None stands for a handler that C code set, which Python cannot put back
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    @contextmanager
    def second_sigint_raises(self) -> Generator[None]:
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False

    def _note(self, signum: int, frame: FrameType | None) -> None:
        # SIGTERM twice is one wish: a process group and its `make` both deliver it
        if self._in_step and self.first == signum == signal.SIGINT:
            raise KeyboardInterrupt
        if self.first is None:
            self.first = signum
