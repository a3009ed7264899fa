"""The loop around a step: batches in, hooks after each step, and a signal that loses no finished step."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from functrain import data, tree
from functrain.train.guard import Diverged
from functrain.train.hooks import Hook, Hooks
from functrain.train.hooks import Metrics as Metrics
from functrain.train.loop_checks import check_fit, count, goes_on, is_indexed
from functrain.train.protocols import Batch, Batches
from functrain.train.signals import Signals
from functrain.train.state import TrainState

Step: TypeAlias = Callable[[TrainState, Any], tuple[TrainState, Metrics]]  # whatever its batches are
_log = logging.getLogger(__name__)


class Interrupted(SystemExit):
    """A signal stopped `fit` after a finished step: `state` is the state after it, `signum` the signal.

    It is a SystemExit so that a script that does not catch it ends with the shell's code for the signal: 130 after
    SIGINT, 143 after SIGTERM, 129 after SIGHUP, which a terminal that closes sends and nohup turns off.
    """

    def __init__(self, signum: int, state: TrainState) -> None:
        super().__init__(128 + signum)
        self.signum = signum
        self.state = state

    def __str__(self) -> str:
        return f"{signal.Signals(self.signum).name} stopped training after step {_done(self.state)}"


def fit(
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    state: TrainState,
    batches: Batches[Batch],
    *,
    steps: int,
    every: Sequence[Hook] = (),
) -> TrainState:
    """Run `step` from step `state.step` to `steps`, and every hook after each step.

    Equals `for t in range(state.step, steps): state, metrics = step(state, batches[t])`, with `hook(t + 1, state,
    metrics)` for each hook in the loop. Batches are moved to the state's device; those that can be indexed are read
    ahead in a thread, and their copy overlaps the step; an iterator is advanced once a step. Only hooks read metrics:
    nothing else waits for a device.
    The states of an `ft.sweep` are a state here, with a step for each lane.

    A hook may add metrics to its step, end the run by returning `ft.train.Stop(reason)`, and have methods for its
    beginning and end: see `ft.train.Hook`. After a Stop all hooks of that step still run, the state is saved as after
    the last step, and returned: `state.step < steps` tells. Where a hook has a method `go_back`, as that of `roll_back`
    has, and a hook raises `Diverged`, the loop goes on from the state `hook.go_back(diverged)`. Step t of a state that
    has left out batches, as its guard says, reads `batches[t + state.guard.left_out]`.

    On SIGINT, SIGTERM or SIGHUP the running step ends, its hooks and `save` run, and `Interrupted` is raised. A second
    SIGINT in the same step, or while it waits for its batch, gives that step up (KeyboardInterrupt, the last checkpoint
    stands); while hooks run, every further signal waits. Handlers are set in the main thread only, and put back. Where
    torch.distributed runs, a signal in one rank ends the same step in all; no rank may have fewer batches. When the
    program ends, the process group is destroyed if it is still there.

    Batches that are iterated anew for each epoch, as a DataLoader, are at the first one when an epoch ends. Within
    one, a DataLoader that does not shuffle is read up to where the state is; of others nobody knows where that is.

    Raises: Interrupted; Diverged; ValueError if the state is past `steps`, the batches are fewer, or where they go on
    is not known, naming a leaf that requires grad, and for a metric that two give; TypeError for an argument, or what a
    hook returns, of another kind.

    >>> step = ft.train_step(lambda params, x, key: (params["w"] - x) ** 2, ft.optim.sgd(0.25))
    >>> state = ft.init_state({"w": torch.tensor(0.0)}, ft.optim.sgd(0.25), key=ft.random.key(0))
    >>> losses = lambda t, state, metrics: print(t, metrics["loss"])
    >>> ft.fit(step, state, [torch.tensor(1.0)] * 3, steps=3, every=[losses]).params
    1 tensor(1.)
    2 tensor(0.2500)
    3 tensor(0.0625)
    {'w': tensor(0.8750)}
    """
    check_fit(step, state, batches, every)
    steps = count("fit", "steps", steps)
    for path, leaf in tree.items(state):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            raise ValueError(
                f"fit: {path}: expected a tensor that does not require grad, since every step would keep the graphs of "
                "all steps before; detach it, or differentiate through ft.unroll"
            )
    start = t = _done(state)
    if start > steps:
        raise ValueError(f"fit: the state has done {start} steps, more than steps={steps}; ask for at least {start}")
    hooks = Hooks(every)
    with Signals() as signals, hooks.closing(), _Reader(batches, state, steps) as reader:
        stop = hooks.begin(t, steps, state)
        while not signals.stop(state.key.device, wanted=stop is not None) and t < steps:
            with signals.second_sigint_raises():
                batch = reader.next()
                if batch is _END:
                    break
                state, metrics = step(state, batch)
            t += 1
            try:
                stop = hooks.after(t, state, metrics)
            except Diverged as found:
                state = hooks.go_back(found)
                reader.seek(state, steps)
                # no step that was saved holds this state, whatever its number
                start, t = -1, _done(state)
                stop = hooks.begin(t, steps, state)
        if t != start:
            hooks.save(t, state)
        stopped = signals.stop(state.key.device, wanted=stop is not None)
        if signals.first is not None:
            raise Interrupted(signals.first, state)
        if stopped:
            reason = "another rank did" if stop is None else stop.reason
            _log.warning("stopped after step %d of %d: %s", t, steps, reason)
        elif t < steps:
            raise ValueError(
                f"fit: the batches ended after step {t}, before steps={steps}; give more, or ask for fewer"
            )
        hooks.end(t)
    return state


_END = object()


def _done(state: TrainState) -> int:
    return int(state.step.reshape(-1)[0])  # the lanes of a sweep have all done as many


def _left_out(state: TrainState) -> int:
    return 0 if state.guard is None else int(state.guard.left_out.reshape(-1)[0])


class _Reader:
    """The batches of the steps from a state on: read ahead in a thread, or of an iterator, which only goes forward."""

    def __init__(self, batches: Any, state: TrainState, steps: int) -> None:
        self._indexed, self._device = is_indexed(batches), state.key.device
        self._position = _done(state) + _left_out(state)
        self._batches: Any = batches if self._indexed else goes_on(batches, self._position)
        self._source: Iterator[Any] = iter(())
        self.seek(state, steps)

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def next(self) -> Any:
        self._position += 1
        batch = next(self._source, _END)
        if batch is _END or self._indexed or self._device.type == "cpu":
            return batch
        return tree.map(lambda leaf: leaf.to(self._device) if isinstance(leaf, Tensor) else leaf, batch)

    def seek(self, state: TrainState, steps: int) -> None:
        left_out = _left_out(state)
        first, last = _done(state) + left_out, steps + left_out
        if not self._indexed:
            self._source = self._batches
            while self._position < first and self.next() is not _END:
                pass
            return
        if hasattr(self._batches, "__len__") and len(self._batches) < last:
            more = f" after {left_out} that are left out" if left_out else ""
            raise ValueError(f"fit: {len(self._batches)} batches for steps={steps}{more}; give more, or ask for fewer")
        self._close()
        self._source = data.prefetch(
            self._batches, first, last, device=None if self._device.type == "cpu" else self._device
        )

    def _close(self) -> None:
        # the caller's own iterator stays open: a next call of `fit` goes on from it
        if self._indexed and isinstance(self._source, Generator):
            self._source.close()  # ends the thread
