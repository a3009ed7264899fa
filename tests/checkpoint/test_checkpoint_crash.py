"""Killed at any instant, a run keeps every checkpoint whose save had returned, and never takes a part for the whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import checkpoint_crashes


def crashes(mode: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, checkpoint_crashes.__file__, mode, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout)


def test_a_kill_or_a_power_cut_at_any_system_call_loses_nothing(tmp_path: Path) -> None:
    # memory where there is: thousands of fsyncs wait for a disk, and what they guarantee is simulated here
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else tmp_path) as folder:
        found = crashes("every-call", Path(folder))
    print(f"crash points tried: {sum(found.values())} {found}, losses: 0")
    assert found.keys() == {"save", "overwrite", "retention", "asynchronous"} and min(found.values()) > 30


def test_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    found = crashes("random", tmp_path)
    print(f"kills: {found['kills']}, steps saved: {found['steps']}, losses: 0")
    assert found["steps"] > 20
