"""A run that is killed at any moment and started again equals, bit for bit, the run that was not killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import resume_kills
import resume_training
import torch

from functrain import checkpoint, tree


def assert_equal_runs(whole: Path, killed: Path) -> None:
    """The final states have the same bytes, and whatever was read for a step is what belongs to that step."""
    assert resume_kills.differences(whole, killed) == []


def test_killed_at_random_moments_and_resumed_equals_not_killed(tmp_path: Path) -> None:
    command = [sys.executable, resume_kills.__file__, str(tmp_path), "12"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["kills"] >= 4
    print(f"kills: {found['kills']}, losses: 0")
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")


def test_a_program_killed_and_started_again_equals_not_killed(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for run in (whole, killed):
        run.mkdir()
    resume_training.train(whole)
    command = [sys.executable, resume_training.__file__, str(killed)]
    program = subprocess.Popen(command)
    after = random.Random(0).randrange(1, resume_training.STEPS // 2)
    while program.poll() is None and resume_kills.lines(killed / "batches") < after:
        time.sleep(0.001)
    program.send_signal(signal.SIGKILL)
    assert program.wait() == -signal.SIGKILL and not (killed / "final").exists()
    subprocess.run(command, check=True)
    assert_equal_runs(whole, killed)


@pytest.mark.parametrize("stop", [1, resume_training.SAVED_EVERY, resume_training.STEPS])
def test_a_run_that_ended_goes_on_as_if_it_had_not(stop: int, tmp_path: Path) -> None:
    """Stopping at, between and after the saved steps; the state's every bit, then the next steps."""
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    state = resume_training.train(tmp_path / "whole", stop + 2)
    resume_training.train(tmp_path / "parts", stop)
    newest = checkpoint.latest(tmp_path / "parts")
    assert newest is not None and newest.name == f"step-{stop:08d}"
    os.rename(tmp_path / "parts" / "final", tmp_path / "parts" / "earlier")
    again = resume_training.train(tmp_path / "parts", stop + 2)
    assert tree.structure(again) == tree.structure(state)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(again), tree.leaves(state), strict=True))
