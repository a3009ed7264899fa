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
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from checkpoint_trees import assert_same, small

from functrain import checkpoint
from functrain.checkpoint.run import step_of as run_step

Save = tuple[int, int]  # a step, and which of its histories it belongs to
CHANGING = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir", "ftruncate")
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
    save_all(run, [(t, 0) for t in range(first, last + 1)], said, checkpoint.every(1, run, keep_last=2))


def save_all(run: Path, saves: Sequence[Save], said: Path, hook: checkpoint.Every) -> None:
    out = REAL["open"](said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for t, version in saves:
        hook(t, state(t, version), {"loss": torch.tensor(LOSSES[t % len(LOSSES)])})
        hook.wait()
        REAL["write"](out, f"{t}\n".encode())


def state(t: int, version: int) -> Any:
    return small(t + 1000 * version)


def forked(work: Callable[[], None]) -> int:
    with warnings.catch_warnings():
        # of jax, where another test of this process has imported it: fork and its threads; the child uses none
        warnings.simplefilter("ignore", RuntimeWarning)
        pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def done(work: Callable[[], None]) -> int:
    """Run in a process of its own and return its exit code, negative for a signal."""
    status = os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1])
    assert status in (0, -signal.SIGKILL), "the saving process failed, see above"
    return status


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


def saved(run: Path, saves: Sequence[Save], count: int) -> int:
    """After `count` saves returned, the newest checkpoint is that of the last, or of the one then under way."""
    newest = checkpoint.latest(run)
    if newest is None:
        assert count == 0, f"{run}: {saves[count - 1]} was saved and is lost"
        return 0
    found = checkpoint.load(newest, like=small(0) | {"note": ""})
    for more in (1, 0):
        if 0 < count + more <= len(saves):
            t, version = saves[count + more - 1]
            if run_step(newest) == t and int(found["step"]) == t + 1000 * version:
                assert_same(state(t, version), found)
                return count + more
    raise AssertionError(f"{run}: after {count} of {saves} the newest is {newest}, {found['note']}")


def cut_power(log: Path, *, renames: bool) -> None:
    """Undo what a power cut may undo: bytes of files and names in folders that were not brought to the disk.

    A file system orders them as it likes: `renames` may be lost with the rest, or have come to the disk before it.
    """
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
    for old, new in reversed(renamed) if renames else ():
        if os.path.exists(new):
            os.rename(new, old)


class Scenario(NamedTuple):
    """Saves that are there before, and those during which the process is killed."""

    before: list[Save]
    saves: list[Save]
    options: dict[str, Any]


SCENARIOS = {
    # saves, and from the third on removals
    "save": Scenario([], [(t, 0) for t in range(1, 5)], {"keep_last": 2}),
    # the run went back: step 2 and then 3 are saved anew, with other bits
    "overwrite": Scenario([(t, 0) for t in (1, 2, 3)], [(2, 1), (3, 1)], {"keep_last": None}),
    # step 2 is a multiple of 2 and stays, step 3 is the best and stays, 4 goes when 5 has come
    "retention": Scenario(
        [(t, 0) for t in (1, 2, 3, 4)],
        [(5, 0), (6, 0), (7, 0)],
        {"keep_last": 1, "keep_every": 2, "keep_best": checkpoint.Best("loss")},
    ),
    "asynchronous": Scenario([(1, 0), (2, 0)], [(3, 0)], {"keep_last": 1, "asynchronous": True}),
}
LOSSES = (9.0, 5.0, 4.0, 1.0, 3.0, 2.0, 6.0, 7.0)
KEPT = {"save": [3, 4], "overwrite": [1, 2, 3], "retention": [2, 3, 4, 6, 7], "asynchronous": [3]}


def every_call(folder: Path) -> dict[str, int]:
    """Kill at each call in turn: once with half of the last write done, and with two kinds of power cut."""
    points = dict.fromkeys(SCENARIOS, 0)
    for name, scenario in SCENARIOS.items():
        root = folder / name
        root.mkdir()
        before = {**scenario.options, "keep_last": None}
        assert done(functools.partial(_saves, root, scenario.before, root / "said", before)) == 0
        for power in ("", "all", "but renames"):
            for fatal in itertools.count():
                run = folder / f"{name}-{power}-{fatal}"
                shutil.copytree(root, run)
                status = done(functools.partial(_killed_at, run, scenario, fatal, torn=not power))
                if power:
                    cut_power(run / "log", renames=power == "all")
                for path in checkpoint.list(run):  # nothing half written or half removed has its name
                    checkpoint.verify(path)
                all_saves = scenario.before + scenario.saves
                count = saved(run, all_saves, len((run / "said").read_text().split()))
                if status == 0:
                    assert count == len(all_saves)
                    steps = [run_step(path) for path in checkpoint.list(run)]
                    assert steps == KEPT[name], f"{run}: kept {steps}"
                    shutil.rmtree(run)
                    break
                _goes_on(run, all_saves, count, scenario.options)
                assert [run_step(path) for path in checkpoint.list(run)] == KEPT[name], run
                shutil.rmtree(run)
                points[name] += 1
    return points


def _saves(run: Path, saves: Sequence[Save], said: Path, options: dict[str, Any]) -> None:
    save_all(run, saves, said, checkpoint.every(1, run, **options))


def _killed_at(run: Path, scenario: Scenario, fatal: int, *, torn: bool) -> None:
    Shim(fatal, torn, os.open(run / "log", os.O_WRONLY | os.O_CREAT))
    _saves(run, scenario.saves, run / "said", scenario.options)


def _goes_on(run: Path, saves: Sequence[Save], count: int, options: dict[str, Any]) -> None:
    # the last that was saved is saved again: a removal that was cut short is made good
    rest = saves[max(count - 1, 0) :]
    _saves(run, rest, run / "again", options)
    left = {path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")}
    assert left == {".lock"}, f"{run}: left over: {left}"
    assert saved(run, saves, len(saves)) == len(saves)


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
