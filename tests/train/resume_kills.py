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

sys.path.append(str(Path(__file__).parents[1] / "checkpoint"))  # run as a script, it has no path from pytest

from checkpoint_crashes import forked  # noqa: E402
from resume_training import STEPS, train  # noqa: E402


def finished(run: Path, more: int | None, moment: float = 0.0, *, steps: int = STEPS, behind: bool = False) -> bool:
    """Train in a process of its own, killed `moment` seconds after it read `more` batches; say if it ended before.

    Saves are `behind` the training or in it.
    """
    enough = lines(run / "batches") + more if more is not None else None
    pid = forked(functools.partial(train, run, steps, asynchronous=behind))
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


def main(folder: Path, kills: int, steps: int = STEPS, seed: int = 0) -> dict[str, int]:
    """Train as `whole` and as `killed`; of the second, every other start saves behind the training."""
    for name in ("whole", "killed"):
        (folder / name).mkdir()
    assert finished(folder / "whole", None, steps=steps)
    moments = random.Random(seed)
    killed = 0
    while killed < kills and not (folder / "killed" / "final").exists():
        more, moment, behind = moments.randrange(1, 12), moments.uniform(0.0, 0.03), bool(killed % 2)
        killed += not finished(folder / "killed", more, moment, steps=steps, behind=behind)
    if not (folder / "killed" / "final").exists():
        assert finished(folder / "killed", None, steps=steps)
    return {"kills": killed}


def differences(whole: Path, killed: Path, steps: int = STEPS) -> list[str]:
    """Tell in what two runs differ: the bytes of their final states, and the batches that each step was trained on."""
    found = []
    for name in ("tensors.safetensors", "tree.json", "manifest.json"):
        if (whole / "final" / name).read_bytes() != (killed / "final" / name).read_bytes():
            found.append(f"final/{name}")
    belongs = dict(line.split() for line in (whole / "batches").read_text().splitlines())
    if [int(t) for t in belongs] != list(range(steps)):
        found.append("the batches of the whole run")
    read = [line.split() for line in (killed / "batches").read_text().splitlines()]
    found += [f"the batch of step {t}" for t, digest in read if belongs[t] != digest]
    return found + [f"no batch of step {t}" for t in belongs.keys() - {t for t, _ in read}]


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
