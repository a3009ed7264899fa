"""What runs after a step: the contract of hooks, and the order in which they run.

A hook is a function of (t, state, metrics). What it may return, and the methods that it may have, stand in `Hook`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, NamedTuple, Protocol, TypeAlias

from torch import Tensor

from functrain.train.guard import Diverged
from functrain.train.loop_checks import check_hook, count
from functrain.train.state import TrainState

Metrics: TypeAlias = dict[str, Any]


class Stop(NamedTuple):
    """What a hook returns to end the run after this step, as if it were the last: early stopping, a time limit."""

    reason: str


class Hook(Protocol):
    """A callback `hook(t, state, metrics)` of `ft.fit`, called when step number t (from 1) is done.

    It returns None; or a mapping from names to numbers or () tensors, metrics of this step that the hooks after it see
    too; or `ft.train.Stop(reason)`. In each step the hooks run in three groups, each in the order of the list:

    1. those with an attribute `measures = True`, as `ft.train.validate` returns: all others see what they measure;
    2. all others;
    3. those with a method `due`, as `ft.checkpoint.every` returns: they save. Where `due(t, metrics)` of one tells that
       it will save now, `flush()` of all hooks is called before: what a record holds of the steps up to a checkpoint is
       on the disk before the checkpoint is.

    Optional methods, of which a hook may have any:

    - `begin(t, steps, state)`, before the first step and again after `go_back`: the run goes on from step t, forget
      what came after it. May return a Stop, so that a run that was stopped early and is started again stops at once.
    - `flush()`: bring to the disk what waits.
    - `aside(seconds)`: so long the groups that measure and save have taken, which is no time of training.
    - `save(t, state)`, when the loop stops: after all steps, a Stop, a signal, or where the batches end.
    - `go_back(diverged)` returns the state to go on from, where a hook has raised `ft.train.Diverged`.
    - `end(t)`, after all steps or a Stop, when all is saved: the place to say that what was waited for never came.
    - `fail(error)`, before `close`, where the run ends by a signal (`Interrupted`) or by an error.
    - `close()`, at last, also after a signal or an error.
    """

    def __call__(self, t: int, state: Any, metrics: Metrics, /) -> Mapping[str, Any] | Stop | None: ...


METHODS = ("begin", "flush", "aside", "save", "go_back", "end", "fail", "close")


def every(n: int, fn: Hook) -> Hook:
    """Return a hook that calls `fn` when the number of steps done is a multiple of `n`, and has its optional methods.

    The last step is no exception: choose a number of steps that is a multiple, or call `fn` on what `fit` returns.

    Raises: ValueError if `n` is not positive; TypeError for what is no int, or no hook.

    >>> hook = ft.train.every(2, lambda t, state, metrics: print(f"step {t}: {metrics['loss']}"))
    >>> for t in range(1, 5):  # as ft.fit does with every=[hook]
    ...     hook(t, None, {"loss": 1 / t})
    step 2: 0.5
    step 4: 0.25
    """
    check_hook("every", fn)
    if count("every", "n", n) < 1:
        raise ValueError(f"every: expected n of at least 1, came {n}")

    def hook(t: int, state: TrainState, metrics: Metrics) -> Mapping[str, Any] | Stop | None:
        return fn(t, state, metrics) if t % n == 0 else None

    for name in ("measures", *METHODS):
        if hasattr(fn, name):
            setattr(hook, name, getattr(fn, name))
    if hasattr(fn, "due"):
        due: Callable[[int, Metrics], bool] = fn.due
        vars(hook)["due"] = lambda t, metrics: t % n == 0 and due(t, metrics)
    return hook


class Hooks:
    """The hooks of a run, in the order in which they run."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self._given = list(hooks)
        self._measuring = [hook for hook in hooks if getattr(hook, "measures", False)]
        rest = [hook for hook in hooks if not getattr(hook, "measures", False)]
        self._saving: list[Any] = [hook for hook in rest if hasattr(hook, "due")]
        self._others = [hook for hook in rest if not hasattr(hook, "due")]
        self._ordered = [*self._measuring, *self._others, *self._saving]

    def begin(self, t: int, steps: int, state: TrainState) -> Stop | None:
        found = None
        for begin in self._methods("begin"):
            result = begin(t, steps, state)
            found = found or (result if isinstance(result, Stop) else None)
        return found

    def after(self, t: int, state: TrainState, metrics: Metrics) -> Stop | None:
        """Call all hooks after step t, and return the first Stop."""
        with self._aside(self._measuring):
            metrics, stop = _call(self._measuring, t, state, metrics, None)
        metrics, stop = _call(self._others, t, state, metrics, stop)
        due = [hook for hook in self._saving if hook.due(t, metrics)]
        if due:
            self._flush()
        with self._aside(due):
            return _call(self._saving, t, state, metrics, stop)[1]

    def save(self, t: int, state: TrainState) -> None:
        self._flush()
        for save in self._methods("save"):
            save(t, state)

    def go_back(self, found: Diverged) -> TrainState:
        """Return the state to go on from. Raises: Diverged where no hook has one."""
        for go_back in self._methods("go_back"):
            state: TrainState = go_back(found)
            return state
        raise found

    def end(self, t: int) -> None:
        for end in self._methods("end"):
            end(t)

    @contextmanager
    def closing(self) -> Generator[None]:
        """Close all hooks at the end of the block; an error of the block is not hidden by one of closing."""
        try:
            yield
        except BaseException as error:
            for failure in [*self._all("fail", error), *self._all("close")]:
                error.add_note(f"and closing a hook failed: {type(failure).__name__}: {failure}")
            raise
        for failure in self._all("close"):
            raise failure

    def _all(self, name: str, *args: Any) -> list[Exception]:
        failures = []
        for method in self._methods(name):
            try:
                method(*args)
            except Exception as failure:  # the other hooks have files to close, too
                failures.append(failure)
        return failures

    def _flush(self) -> None:
        for flush in self._methods("flush"):
            flush()

    @contextmanager
    def _aside(self, hooks: Sequence[Hook]) -> Generator[None]:
        start = time.perf_counter()
        yield
        if hooks:
            for aside in self._methods("aside"):
                aside(time.perf_counter() - start)

    def _methods(self, name: str) -> Iterable[Callable[..., Any]]:
        return [getattr(hook, name) for hook in self._ordered if hasattr(hook, name)]


def _call(
    hooks: Sequence[Hook], t: int, state: TrainState, metrics: Metrics, stop: Stop | None
) -> tuple[Metrics, Stop | None]:
    for hook in hooks:
        found = hook(t, state, metrics)
        if isinstance(found, Stop):
            stop = stop or found
        elif found is not None:
            metrics = _with(metrics, found, hook)
    return metrics, stop


def _with(metrics: Metrics, found: Any, hook: Hook) -> Metrics:
    name = getattr(hook, "__name__", type(hook).__name__)
    if not isinstance(found, Mapping):
        stop = "; return ft.train.Stop(reason), an instance, to end the run" if found is True or found is Stop else ""
        raise TypeError(
            f"fit: expected the hook {name} to return None, a dict of metrics or ft.train.Stop(reason), came "
            f"{type(found).__name__} {found!r}{stop}"
        )
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, (Real, Tensor)):
            raise TypeError(
                f"fit: expected the hook {name} to return metrics, names and numbers or () tensors, came {key!r}: "
                f"{type(value).__name__} {value!r}"
            )
        if key in metrics:
            raise ValueError(f"fit: the hook {name} returns a metric {key!r}, which this step has already; rename it")
    return {**metrics, **found}
