"""Kill a process that saves, at every system call in turn or at random times, and look at what is left.

Run as `python checkpoint_crashes.py every-call|random FOLDER`; prints one line of JSON. Every killed process is forked
from this one, which has imported torch already, and this one stays single-threaded.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoint_trees import assert_same, small

from functrain import checkpoint

CHANGING = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir", "ftruncate")
LAST = 4  # of the steps that a process saves; retention begins at 3
KILLS = 20


REAL = {name: getattr(os, name) for name in CHANGING}


class Shim:
    """Count the calls that change the disk, kill this process at the `fatal` one, and log what a power cut may undo."""

    def __init__(self, fatal: int, torn: bool, log: int) -> None:
        self.calls, self.fatal, self.torn, self.log = 0, fatal, torn, log
        self.paths: dict[int, str] = {}
        for name in CHANGING:
            setattr(os, name, getattr(self, name))

    def _note(self, *words: str) -> None:
        REAL["write"](self.log, (json.dumps(words) + "\n").encode())

    def _count(self) -> None:
        if self.calls == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.calls += 1

    def open(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT:
            self._count()
            self._note("created", os.fspath(path))
        fd = REAL["open"](path, flags, *args, **kwargs)
        self.paths[fd] = os.fspath(path)
        return fd

    def write(self, fd: int, data: Any) -> int:
        self._note("dirty", self.paths[fd])
        if self.torn and self.calls == self.fatal:
            REAL["write"](fd, data[: len(data) // 2])
        self._count()
        return REAL["write"](fd, data)

    def fsync(self, fd: int) -> None:
        self._count()
        REAL["fsync"](fd)
        self._note("clean", self.paths[fd])

    def rename(self, old: Any, new: Any) -> None:
        self._count()
        self._note("renamed", str(old), str(new))
        REAL["rename"](old, new)

    def mkdir(self, *args: Any, **kwargs: Any) -> None:
        self._count()
        REAL["mkdir"](*args, **kwargs)

    def unlink(self, *args: Any, **kwargs: Any) -> None:
        self._count()
        REAL["unlink"](*args, **kwargs)

    def rmdir(self, *args: Any, **kwargs: Any) -> None:
        self._count()
        REAL["rmdir"](*args, **kwargs)

    def ftruncate(self, *args: Any) -> None:
        self._count()
        REAL["ftruncate"](*args)


def save_steps(run: Path, first: int, last: int, said: Path) -> None:
    """Save step after step, writing each into `said` once its save has returned."""
    out = REAL["open"](said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    hook = checkpoint.every(1, run, keep_last=2)
    for t in range(first, last + 1):
        hook(t, small(t), {})
        REAL["write"](out, f"{t}\n".encode())


def forked(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def newest_said(path: Path) -> int:
    return max([0, *map(int, path.read_text().split())]) if path.exists() else 0


def check(run: Path, said: int) -> int:
    """The newest checkpoint is whole, is what was saved, and no save that had returned is lost."""
    newest = checkpoint.latest(run)
    if newest is None:
        assert said == 0, f"{run}: step {said} was saved and is lost"
        return 0
    step = int(newest.name.removeprefix("step-"))
    assert step >= said, f"{newest}: step {said} was saved and is lost"
    assert_same(small(step), checkpoint.load(newest))
    assert_same(small(step), checkpoint.load(newest, like=small(step)))
    return step


def cut_power(log: Path) -> None:
    """Undo what a power cut may undo: bytes of files and names in folders that were not brought to the disk."""
    dirty: set[str] = set()
    created: set[str] = set()
    renamed: list[tuple[str, str]] = []
    for line in log.read_text().splitlines():
        match json.loads(line):
            case ["dirty", path]:
                dirty.add(path)
            case ["created", path]:
                created.add(path)
            case ["clean", path]:
                dirty.discard(path)
                created = {name for name in created if os.path.dirname(name) != path}
                renamed = [pair for pair in renamed if os.path.dirname(pair[1]) != path]
            case ["renamed", old, new]:
                renamed.append((old, new))
                dirty = {path.replace(old, new) for path in dirty}
                created = {path.replace(old, new) for path in created}
    for path in filter(os.path.exists, dirty):
        os.truncate(path, 0)
    for path in filter(os.path.exists, created):
        os.unlink(path)
    for old, new in reversed(renamed):
        if os.path.exists(new):
            os.rename(new, old)


def every_call(folder: Path) -> dict[str, int]:
    """Kill at each call in turn: once with half of the last write done, once with a power cut."""
    points = 0
    for power in (False, True):
        for fatal in itertools.count():
            run = folder / f"{power}-{fatal}"
            run.mkdir()
            pid = forked(functools.partial(_killed_at, run, fatal, torn=not power))
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            assert status in (0, -signal.SIGKILL), f"{run}: the saving process failed, see above"
            if power:
                cut_power(run / "log")
            else:
                for path in checkpoint.list(run):  # nothing half removed keeps its name
                    checkpoint.verify(path)
            step = check(run, newest_said(run / "said"))
            if status == 0:
                assert step == LAST
                break
            _goes_on(run, step + 1)
            shutil.rmtree(run)
            points += 1
    return {"points": points}


def _killed_at(run: Path, fatal: int, *, torn: bool) -> None:
    Shim(fatal, torn, os.open(run / "log", os.O_WRONLY | os.O_CREAT))
    save_steps(run, 1, LAST, run / "said")


def _goes_on(run: Path, step: int) -> None:
    checkpoint.every(1, run).save(step, small(step))
    left = {path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")}
    assert left == {".lock"}, f"{run}: left over: {left}"
    assert check(run, step) == step


def at_random(folder: Path) -> dict[str, int]:
    """Kill at random moments, and go on from what is left."""
    moments = random.Random(0)
    step = 0
    for _ in range(KILLS):
        pid = forked(functools.partial(save_steps, folder, step + 1, step + 10_000, folder / "said"))
        enough = step + moments.randrange(4)
        while newest_said(folder / "said") < enough:
            time.sleep(0.0005)
        time.sleep(moments.uniform(0.0, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        step = check(folder, newest_said(folder / "said"))
        with (folder / "said").open("a") as said:  # what was saved and not yet said
            said.write(f"{step}\n")
    return {"kills": KILLS, "steps": step}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"every-call": every_call, "random": at_random}[sys.argv[1]](Path(sys.argv[2]))))
