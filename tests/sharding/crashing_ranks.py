"""Kill one of two ranks that save together, at every system call that changes the disk, and look at what is left.

Run as `python crashing_ranks.py FOLDER`; prints one line of JSON. The ranks are forked from this process, which has
imported torch and has no threads of its own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import saving
import torch
from checkpoint_crashes import REAL, Shim, forked
from torch import distributed

import functrain as ft


def rank_of(number: int, fatal: tuple[int, int], folder: Path, torn: bool) -> None:
    """Save as rank `number` of two; rank `fatal[0]` dies at call `fatal[1]`."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (of the other rank, which sees a connection close)
    os.dup2(sys.stderr.fileno(), 2)
    store = distributed.FileStore(str(folder / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=number, world_size=2, timeout=timedelta(seconds=20))
    plan = saving.plan_of({"fsdp": 2})
    tree = saving.sharded(plan)
    if number == fatal[0]:
        log = REAL["open"](folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        Shim(fatal[1], torn, log)
    try:
        ft.checkpoint.save(folder / "mine", tree, plan=plan)
    except Exception:
        os._exit(3)  # the other one died
    os._exit(0)


def killed(fatal: tuple[int, int], folder: Path, torn: bool) -> tuple[bool, list[int]]:
    folder.mkdir()
    pids = [forked(lambda number=number: rank_of(number, fatal, folder, torn)) for number in (0, 1)]  # type: ignore[misc]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return codes[fatal[0]] == -signal.SIGKILL, codes


def main() -> None:
    root, counts = Path(sys.argv[1]), {"killed": 0, "whole": 0, "absent": 0}
    wanted: Any = saving.values()
    for victim in (0, 1):
        for call in range(200):
            died, codes = killed((victim, call), folder := root / f"{victim}-{call}", torn=call % 2 == 1)
            there = (folder / "mine").exists()
            if not died:
                assert codes == [0, 0] and there, (victim, call, codes)
                break
            counts["killed"] += 1
            counts["whole" if there else "absent"] += 1
            if there:  # it has its name: all is there
                saving.same_bits(ft.checkpoint.load(folder / "mine"), wanted)
            else:
                assert codes[1 - victim] == 3, (victim, call, codes)  # told, and not left waiting
            # what is left over does not stand in the way of the next save
            if call % 4 == 0:
                ft.checkpoint.save(folder / "next" / "mine", {"w": torch.zeros(2)})
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
