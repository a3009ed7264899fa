"""Train once undisturbed and once killed at random moments: `python resume_kills.py FOLDER KILLS`, prints JSON.

Every training process is forked from this one, which has only imported; see resume_training.py.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from checkpoint_crashes import forked
from resume_training import train


def finished(run: Path, more: int | None, moment: float = 0.0) -> bool:
    """Train in a process of its own, killed `moment` seconds after it read `more` batches; say if it ended before."""
    enough = lines(run / "batches") + more if more is not None else None
    pid = forked(functools.partial(train, run))
    while enough is not None and lines(run / "batches") < enough:
        if os.waitpid(pid, os.WNOHANG) != (0, 0):
            return True
        time.sleep(0.0005)
    if enough is not None:
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), "training failed, see above"
    return status == 0


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main(folder: Path, kills: int) -> dict[str, int]:
    for name in ("whole", "killed"):
        (folder / name).mkdir()
    assert finished(folder / "whole", None)
    moments = random.Random(0)
    killed = 0
    while killed < kills and not (folder / "killed" / "final").exists():
        killed += not finished(folder / "killed", moments.randrange(1, 12), moments.uniform(0.0, 0.03))
    if not (folder / "killed" / "final").exists():
        assert finished(folder / "killed", None)
    return {"kills": killed}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
