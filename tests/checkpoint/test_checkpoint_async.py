"""An asynchronous save is of the moment of its call, is waited for, and cannot fail unseen."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_trees import assert_same, small
from test_checkpoint_header import every_dtype

from functrain import checkpoint, tree
from functrain.checkpoint import writing
from functrain.compiler.donation import ConsumedError, pass_on


def at(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


class Gate:
    """Hold every write until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.written = threading.Event(), list[str]()
        write = writing.write

        def waiting(target: Path, drafted: writing.Draft, *crew: Any) -> None:
            assert self.open.wait(30)
            write(target, drafted, *crew)
            self.written.append(target.name)

        monkeypatch.setattr(writing, "write", waiting)


def test_the_state_may_change_as_soon_as_the_call_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    hook = checkpoint.every(1, tmp_path, asynchronous=True)
    state = {**small(1), "z": torch.complex(torch.ones(2), torch.ones(2)).conj(), "t": torch.ones(2, 3).t()}
    before = tree.map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, state)
    before["params"]["tied"] = before["params"]["w"]
    hook(1, state, {})
    assert not at(tmp_path, 1).exists()
    for leaf in tree.leaves(state):
        if isinstance(leaf, torch.Tensor):
            leaf.zero_()
    gate.open.set()
    hook.wait()
    assert_same(before, checkpoint.load(at(tmp_path, 1)))


def test_a_step_may_take_the_buffers_as_soon_as_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    hook = checkpoint.every(1, tmp_path, asynchronous=True)
    state = {"w": torch.arange(6.0), "n": torch.tensor(1)}
    hook(1, state, {})
    [w, n] = pass_on(list(state.values()))  # as `ft.compile(step, donate=True)` does
    w.fill_(7.0)
    with pytest.raises(ConsumedError):
        state["w"].sum()
    gate.open.set()
    hook.wait()
    assert_same({"w": torch.arange(6.0), "n": torch.tensor(1)}, checkpoint.load(at(tmp_path, 1)))
    with pytest.raises(ConsumedError):
        hook(2, state, {})


def test_overlapping_saves_queue_and_a_third_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    hook = checkpoint.every(1, tmp_path, keep_last=None, asynchronous=True)
    hook(1, small(1), {})
    hook(2, small(2), {})
    third = threading.Thread(target=hook, args=(3, small(3), {}))
    third.start()
    third.join(0.2)
    assert third.is_alive() and gate.written == []
    gate.open.set()
    third.join()
    assert hook.save(4, small(4)) == at(tmp_path, 4)
    assert gate.written == [f"step-0000000{t}" for t in (1, 2, 3, 4)]
    for t in (1, 2, 3, 4):
        assert_same(small(t), checkpoint.load(at(tmp_path, t)))


def test_every_dtype_and_changing_trees_are_copied_to_the_bit(tmp_path: Path) -> None:
    hook = checkpoint.every(1, tmp_path, keep_last=None, asynchronous=True)
    states: list[Any] = [every_dtype(), {"a": torch.empty(0, 3), "b": torch.ones(())}, every_dtype(), small(3)]
    for t, state in enumerate(states, 1):
        hook(t, state, {})
    hook.wait()
    for t, state in enumerate(states, 1):
        assert_same(state, checkpoint.load(at(tmp_path, t)))


def test_a_failed_save_is_raised_by_the_next_call_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = checkpoint.every(1, tmp_path, asynchronous=True)

    def broken(fd: int) -> None:
        raise OSError(28, os.strerror(28))

    for call in (lambda: hook(2, small(2), {}), lambda: hook.save(2, small(2)), hook.wait):
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", broken)
            hook(1, small(1), {})
            while any(thread.name == "functrain-checkpoint" for thread in threading.enumerate()):
                time.sleep(0.001)
        with pytest.raises(checkpoint.StorageError, match="room on the disk, came .*No space left on device"):
            call()
    assert checkpoint.list(tmp_path) == []
    hook.save(1, small(1))  # the step that failed is not taken for saved
    assert_same(small(1), checkpoint.load(at(tmp_path, 1)))


def test_what_cannot_be_saved_is_raised_at_once(tmp_path: Path) -> None:
    hook = checkpoint.every(1, tmp_path, asynchronous=True)
    with pytest.raises(checkpoint.UnsupportedError, match="'x'"):
        hook(1, {"x": object()}, {})
    hook.save(1, small(1))


PROGRAM = """
import os, sys, time, torch
from functrain import checkpoint
fails = sys.argv[2] == "fails"
write = os.write
def slow(fd, data):
    time.sleep(0.1)
    if fails:
        raise OSError(28, os.strerror(28))
    return write(fd, data)
hook = checkpoint.every(1, sys.argv[1], keep_last=None, asynchronous=True)
os.write = slow
# longer than a chunk, so that hashing wants its thread while the program ends
for t in (1, 2):
    hook(t, {"w": torch.full((3 << 20,), float(t))})
print("end of the program")
"""


@pytest.mark.parametrize("ends", ["well", "fails"])
def test_the_end_of_the_program_waits_and_tells_a_failure(ends: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path), ends], capture_output=True, text=True)
    assert done.stdout == "end of the program\n"
    if ends == "fails":
        assert done.returncode == 1 and "a checkpoint was not saved" in done.stderr
        assert "No space left on device" in done.stderr and checkpoint.list(tmp_path) == []
    else:
        assert done.returncode == 0, done.stderr
        for t in (1, 2):
            assert_same({"w": torch.full((3 << 20,), float(t))}, checkpoint.load(at(tmp_path, t)))
