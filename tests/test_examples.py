"""The examples run, and find what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(name: str, *words: str) -> list[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / name), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_sweep_finds_a_rate_that_learns() -> None:
    *lanes, best = run("sweep_learning_rates.py")
    losses = [float(line.split()[-1]) for line in lanes]
    assert len(losses) == 16
    at = losses.index(min(losses))
    assert best.startswith(f"the best lane is {at}: ")
    # the mean square of sin is 1/2: the slowest rate is still there, the best is at a tenth
    assert losses[at] < 0.05 and min(losses[:4]) > 0.3
