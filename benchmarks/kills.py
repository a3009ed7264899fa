"""Training killed at every turn: what is lost by system calls cut short, and by SIGKILL at random moments.

    python benchmarks/kills.py [--kills 200] [--seed 0]

First the enumeration: the process is killed at each call that changes the disk, with half of its bytes written, and
once more with a power cut, in a save, an overwrite, a removal and an asynchronous save; afterwards the newest
checkpoint must be whole and be what was saved last.

Then a live training of a small GPT, started again after each kill until it is done: its final state must have the bytes
of that of a run that nothing disturbed. Every other start saves behind the training.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent / "tests" / room) for room in ("checkpoint", "train")]

import resume_kills  # noqa: E402
import torch  # noqa: E402
from checkpoint_crashes import every_call  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("functrain").setLevel(logging.ERROR)  # each overwrite says what it sets aside
    # memory where there is: thousands of fsyncs wait for a disk, and what they guarantee is simulated
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        points = every_call(Path(folder))
    print(json.dumps({"crash points": sum(points.values()), "of": points, "losses": 0}), flush=True)
    kills, rounds, lost = 0, 0, list[str]()
    while kills < options.kills:
        with tempfile.TemporaryDirectory() as folder:
            left, steps = options.kills - kills, 200
            kills += resume_kills.main(Path(folder), left, steps, seed=options.seed + rounds)["kills"]
            lost += resume_kills.differences(Path(folder) / "whole", Path(folder) / "killed", steps)
        rounds += 1
        print(f"{kills} kills, {rounds} runs, differences: {lost or 'none'}", file=sys.stderr, flush=True)
    print(json.dumps({"kills": kills, "runs": rounds, "steps of a run": steps, "losses": len(lost), "of": lost}))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
