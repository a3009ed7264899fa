"""What a hook may return, the methods it may have, and the order in which hooks run."""

from __future__ import annotations

import itertools
import logging
import os
import signal
from typing import Any

import pytest
import torch

from functrain import checkpoint
from functrain.train import Diverged, Interrupted, Stop, TrainState, every, fit


def step(state: Any, batch: Any) -> Any:
    return state._replace(step=state.step + 1), {"loss": torch.tensor(float(batch))}


def start(t: int = 0) -> TrainState:
    return TrainState(torch.tensor(t), torch.tensor(1.0), (), torch.zeros(2, dtype=torch.int32))


class Told:
    """A hook with every optional method, which writes down what it is told."""

    def __init__(self, log: list[Any] | None = None, name: str = "told", returns: Any = None) -> None:
        self.log: list[Any] = [] if log is None else log
        self.name, self.returns = name, returns

    def __call__(self, t: int, state: Any, metrics: Any) -> Any:
        self.log.append((self.name, t, sorted(metrics)))
        return self.returns(t) if callable(self.returns) else self.returns

    def begin(self, t: int, steps: int, state: Any) -> None:
        self.log.append((self.name, "begin", t, steps))

    def flush(self) -> None:
        self.log.append((self.name, "flush"))

    def save(self, t: int, state: Any) -> None:
        self.log.append((self.name, "save", t))

    def end(self, t: int) -> None:
        self.log.append((self.name, "end", t))

    def close(self) -> None:
        self.log.append((self.name, "close"))


class Measures(Told):
    measures = True


class Saves(Told):
    def due(self, t: int, metrics: Any) -> bool:
        return t % 2 == 0 or metrics.get("measured", 0) > 5


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_hooks_measure_then_watch_then_save_whatever_their_order(order: Any) -> None:
    log: list[Any] = []
    hooks = [
        every(2, Measures(log, "measures", {"measured": 1.0})), Told(log, "watches", {"seen": 2}), Saves(log, "saves"),
    ]  # fmt: skip
    fit(step, start(), range(9), steps=2, every=[hooks[i] for i in order])
    called = [row for row in log if isinstance(row[1], int) or row[1] == "flush"]
    assert called[:4] == [
        ("watches", 1, ["loss"]), ("saves", 1, ["loss", "seen"]),
        ("measures", 2, ["loss"]), ("watches", 2, ["loss", "measured"]),
    ]  # fmt: skip
    assert called[4:7] == [(name, "flush") for name in ("measures", "watches", "saves")]
    assert called[7] == ("saves", 2, ["loss", "measured", "seen"])
    for what in (("begin", 0, 2), ("save", 2), ("end", 2), ("close",)):
        assert [row[0] for row in log if row[1:] == what] == ["measures", "watches", "saves"]
    assert [row[1] for row in log if row[0] == "saves" and row[1] in ("save", "end", "close")] == [
        "save",
        "end",
        "close",
    ]


def test_a_step_of_which_nothing_is_saved_flushes_nothing() -> None:
    told = Told()
    fit(step, start(), range(9), steps=1, every=[told, Saves()])
    assert [row[1] for row in told.log] == ["begin", 1, "flush", "save", "end", "close"]


def test_a_stop_ends_the_run_as_its_last_step_does(caplog: pytest.LogCaptureFixture) -> None:
    log: list[Any] = []
    stops = Told(log, "stops", lambda t: Stop("enough") if t == 3 else None)
    with caplog.at_level(logging.WARNING):
        state = fit(step, start(), range(9), steps=9, every=[stops, Told(log, "after"), Saves(log, "saves")])
    assert int(state.step) == 3 and caplog.messages == ["stopped after step 3 of 9: enough"]
    for name in ("stops", "after", "saves"):
        assert [row[1] for row in log if row[0] == name and row[1] != "flush"] == [
            "begin",
            1,
            2,
            3,
            "save",
            "end",
            "close",
        ]


def test_a_hook_may_stop_a_run_before_its_first_step() -> None:
    class Done(Told):
        def begin(self, t: int, steps: int, state: Any) -> Any:
            return Stop("it was stopped before")

    told = Told()
    assert int(fit(step, start(4), range(9), steps=9, every=[Done(), told]).step) == 4
    assert told.log == [("told", "begin", 4, 9), ("told", "end", 4), ("told", "close")]


def test_after_going_back_hooks_begin_again() -> None:
    class Back(Told):
        def __call__(self, t: int, state: Any, metrics: Any) -> Any:
            if t == 4 and not self.log:
                self.log.append("back")
                raise Diverged(t, 1, state)

        def begin(self, t: int, steps: int, state: Any) -> None: ...

        def go_back(self, found: Diverged) -> Any:
            return start(2)

    told = Told()
    fit(step, start(), range(9), steps=5, every=[told, Back()])
    assert [row[1:] for row in told.log if row[1] == "begin"] == [("begin", 0, 5), ("begin", 2, 5)]
    assert [row[1] for row in told.log if isinstance(row[1], int)] == [1, 2, 3, 4, 3, 4, 5]


@pytest.mark.parametrize(
    ("found", "error", "words"),
    [
        (True, TypeError, "came bool True; return ft.train.Stop"),
        (Stop, TypeError, "an instance, to end the run"),
        ([1.0], TypeError, "expected the hook told to return None, a dict of metrics or ft.train.Stop"),
        ({"a": "b"}, TypeError, "came 'a': str 'b'"),
        ({1: 2.0}, TypeError, "came 1: int|came 1: float"),
        ({"loss": 1.0}, ValueError, "returns a metric 'loss', which this step has already; rename it"),
    ],
)
def test_what_a_hook_must_not_return_is_told(found: Any, error: type[Exception], words: str) -> None:
    def told(t: int, state: Any, metrics: Any) -> Any:
        return found

    with pytest.raises(error, match=words):
        fit(step, start(), range(9), steps=1, every=[told])


def test_hooks_are_closed_after_an_error_and_a_signal_and_hide_neither() -> None:
    class Fails(Told):
        def close(self) -> None:
            super().close()
            raise OSError("the disk is full")

    def broken(t: int, state: Any, metrics: Any) -> None:
        raise RuntimeError("no")

    def signalled(t: int, state: Any, metrics: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    for hook, error in ((broken, RuntimeError), (signalled, Interrupted)):
        first, last = Fails(), Told()
        with pytest.raises(error) as caught:
            fit(step, start(), range(9), steps=3, every=[hook, first, last])
        assert "the disk is full" in caught.value.__notes__[0]
        assert first.log[-1] == last.log[-1] == ("told", "close")
        assert ("told", "end", 1) not in last.log
    last = Told()
    with pytest.raises(OSError, match="the disk is full"):
        fit(step, start(), range(9), steps=1, every=[Fails(), last])
    assert last.log[-1] == ("told", "close")


def test_every_keeps_what_a_hook_has() -> None:
    kept = every(3, Saves())
    for name in ("begin", "flush", "save", "end", "close", "due"):
        assert hasattr(kept, name)
    assert not hasattr(kept, "measures") and every(3, Measures()).measures  # type: ignore[attr-defined]
    due = every(4, Saves()).due  # type: ignore[attr-defined]
    assert [t for t in range(1, 9) if due(t, {})] == [4, 8]


def test_what_a_hook_holds_of_the_steps_up_to_a_checkpoint_is_written_before_it(tmp_path: Any) -> None:
    saves = checkpoint.every(3, tmp_path)

    class Record(Told):
        written = 0

        def __call__(self, t: int, state: Any, metrics: Any) -> None:
            self.at = t

        def flush(self) -> None:
            newest = checkpoint.latest(tmp_path)
            assert newest is None or int(checkpoint.load(newest).step) <= self.written
            self.written = self.at

    record = Record()
    for hooks in ([record, saves], [saves, record]):
        fit(step, start(), range(9), steps=8, every=hooks)
        assert record.written == 8
