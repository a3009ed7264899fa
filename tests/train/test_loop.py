"""The loop equals a for statement, and a signal loses no finished step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functrain.train import Interrupted, every, fit
from functrain.train.state import TrainState

LAW = settings(deadline=None, derandomize=True, max_examples=30)


class Numbers:
    """Batch t is t."""

    def __init__(self):
        self.asked = []

    def __getitem__(self, t):
        self.asked.append(t)
        return torch.tensor(float(t))


def step(state, batch):
    return state._replace(step=state.step + 1, params=state.params * 0.5 + batch), {"loss": batch}


def start(t=0):
    return TrainState(torch.tensor(t), torch.tensor(1.0), (), torch.zeros(2, dtype=torch.int32))


class Saving:
    """A hook with a place to save, as that of checkpoint.every has."""

    def __init__(self):
        self.called, self.saved = [], []

    def __call__(self, t, state, metrics):
        self.called.append((t, int(state.step), float(metrics["loss"])))

    def save(self, t, state):
        self.saved.append((t, int(state.step)))


@LAW
@given(st.integers(0, 5), st.integers(0, 8), st.booleans())
def test_fit_is_the_for_statement(first, more, indexed):
    batches = Numbers() if indexed else (torch.tensor(float(t)) for t in range(first, first + more))
    wanted, called = start(first), []
    for t in range(first, first + more):
        wanted, metrics = step(wanted, torch.tensor(float(t)))
        called.append((t + 1, t + 1, float(t)))
    hook = Saving()
    found = fit(step, start(first), batches, steps=first + more, every=[hook])
    assert torch.equal(found.params, wanted.params) and torch.equal(found.step, wanted.step)
    assert hook.called == called
    assert hook.saved == ([(first + more, first + more)] if more else [])
    if indexed:
        assert batches.asked == list(range(first, first + more))


@LAW
@given(st.integers(1, 4), st.integers(0, 9))
def test_every_calls_on_multiples_and_keeps_save(n, steps):
    hook = Saving()
    fit(step, start(), Numbers(), steps=steps, every=[every(n, hook)])
    assert [t for t, *_ in hook.called] == [t for t in range(1, steps + 1) if t % n == 0]
    assert len(hook.saved) == (1 if steps else 0)
    assert not hasattr(every(n, lambda t, state, metrics: None), "save")


def test_an_iterator_is_advanced_once_a_step_and_stays_open():
    batches = iter([torch.tensor(float(t)) for t in range(5)])
    fit(step, start(), batches, steps=3)
    assert float(next(batches)) == 3.0


@pytest.mark.parametrize("batches", [[torch.tensor(1.0)] * 2, iter([torch.tensor(1.0)] * 2)], ids=["list", "iterator"])
def test_batches_that_end_before_the_steps_are_an_error(batches):
    with pytest.raises(ValueError, match="ask for fewer"):
        fit(step, start(), batches, steps=3)


def test_what_was_done_before_the_batches_ended_is_saved():
    hook = Saving()
    with pytest.raises(ValueError, match="after step 2, before steps=3"):
        fit(step, start(), iter([torch.tensor(1.0)] * 2), steps=3, every=[hook])
    assert hook.saved == [(2, 2)]


def test_a_state_past_the_steps_is_an_error():
    with pytest.raises(ValueError, match="has done 4 steps, more than steps=3"):
        fit(step, start(4), Numbers(), steps=3)


def test_no_thread_is_left_when_a_step_fails():
    def failing(state, batch):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fit(failing, start(), Numbers(), steps=3)
    assert not [thread for thread in threading.enumerate() if "prefetch" in thread.name]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("where", ["step", "hook"])
def test_a_signal_finishes_the_step_runs_the_hooks_saves_and_raises(signum, where):
    def stepping(state, batch):
        if where == "step" and int(batch) == 2:
            os.kill(os.getpid(), signum)
        return step(state, batch)

    def hooking(t, state, metrics):
        if where == "hook" and t == 3:
            os.kill(os.getpid(), signum)

    before = signal.getsignal(signum)
    hook = Saving()
    with pytest.raises(Interrupted) as stopped:
        fit(stepping, start(), Numbers(), steps=9, every=[hooking, hook])
    assert stopped.value.code == 128 + signum and stopped.value.signum == signum
    assert int(stopped.value.state.step) == 3
    assert [t for t, *_ in hook.called] == [1, 2, 3] and hook.saved == [(3, 3)]
    assert str(stopped.value) == f"{signal.Signals(signum).name} stopped training after step 3"
    assert signal.getsignal(signum) is before


def test_under_nohup_a_terminal_that_closes_is_no_reason_to_stop():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:

        def stepping(state, batch):
            os.kill(os.getpid(), signal.SIGHUP)
            return step(state, batch)

        assert int(fit(stepping, start(), Numbers(), steps=2).step) == 2
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_more_signals_wait_for_the_save(signum):
    finished = []

    class Slow(Saving):
        def save(self, t, state):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            finished.append(t)

    def stepping(state, batch):
        os.kill(os.getpid(), signum)
        return step(state, batch)

    with pytest.raises(Interrupted) as stopped:
        fit(stepping, start(), Numbers(), steps=9, every=[Slow()])
    assert finished == [1] and stopped.value.signum == signum


def test_a_second_sigint_gives_the_step_up_and_saves_nothing():
    def stuck(state, batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second signal raises")

    hook = Saving()
    with pytest.raises(KeyboardInterrupt):
        fit(stuck, start(), Numbers(), steps=9, every=[hook])
    assert hook.called == [] and hook.saved == []


def test_outside_the_main_thread_signals_are_left_alone():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def look(t, state, metrics):
        seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=lambda: seen.append(fit(step, start(), Numbers(), steps=2, every=[look])))
    thread.start()
    thread.join()
    assert seen[:2] == [before, before] and int(seen[2].step) == 2


SCRIPT = """
import time, torch
from functrain.train.loop import fit
from functrain.train.state import TrainState

def step(state, batch):
    time.sleep(0.01)
    return state._replace(step=state.step + 1), {}

state = TrainState(torch.tensor(0), torch.zeros(()), (), torch.zeros(2, dtype=torch.int32))
fit(step, state, range(10**6), steps=10**6, every=[lambda t, state, metrics: print(t, flush=True)])
"""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_script_that_catches_nothing_ends_with_the_documented_code(signum, code):
    script = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert script.stdout.readline() == "1\n"
    time.sleep(0.05)
    script.send_signal(signum)
    out, err = script.communicate(timeout=60)
    assert script.returncode == code and err == ""


HANGING = """
import time, torch
from functrain.train.loop import fit
from functrain.train.state import TrainState

class Batches:
    def __getitem__(self, t):
        if t == 3:
            print("hangs", flush=True)
            time.sleep(1000)
        return torch.zeros(2)

state = TrainState(torch.tensor(0), torch.zeros(()), (), torch.zeros(2, dtype=torch.int32))
fit(lambda state, batch: (state._replace(step=state.step + 1), {}), state, Batches(), steps=9)
"""


def test_ctrl_c_ends_a_run_whose_data_never_comes():
    words = [sys.executable, "-c", HANGING]
    script = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert script.stdout.readline() == "hangs\n"
    # the second leaves the loop, the third the wait for its thread, the fourth that of the interpreter
    for _ in range(4):
        time.sleep(0.3)
        script.send_signal(signal.SIGINT)
    try:
        _, errors = script.communicate(timeout=20)
    finally:
        script.kill()
    assert script.returncode == -signal.SIGINT and "KeyboardInterrupt" in errors


@pytest.mark.parametrize("kind", ["indexed", "iterated anew", "iterator"])
def test_batches_come_to_the_states_device_however_they_are_given(kind):
    batches = [{"x": torch.ones(2), "name": "a"}] * 2
    given_as = {"indexed": batches, "iterated anew": dict(enumerate(batches)).values(), "iterator": iter(batches)}[kind]
    seen = []

    def noting(state, batch):
        seen.append((batch["x"].device.type, batch["name"]))
        return state._replace(step=state.step + 1), {}

    fit(noting, start()._replace(key=torch.zeros(2, dtype=torch.int32, device="meta")), given_as, steps=2)
    assert seen == [("meta", "a")] * 2
