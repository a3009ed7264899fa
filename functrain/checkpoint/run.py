"""The checkpoints of a run: RUN/checkpoints/step-00000500, written every n steps, the newest whole one found again."""

from __future__ import annotations

import builtins
import logging
import operator
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from functrain.checkpoint import lock, staging, writing
from functrain.checkpoint.errors import CheckpointError, HeaderError, IntegrityError, MissingError, StorageError
from functrain.checkpoint.reading import verify
from functrain.tree import Tree

Run = str | os.PathLike[str]
_STEP = re.compile(r"step-(\d{8,})")
_log = logging.getLogger(__name__)


def list(run: Run) -> builtins.list[Path]:
    """Return the run's checkpoint folders, oldest step first, without looking inside."""
    folder = Path(run) / "checkpoints"
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def latest(run: Run) -> Path | None:
    """Return the newest checkpoint of which every byte verifies, or None when the run has none.

    Newer ones that do not verify are passed over, each with a message through `logging` (on stderr unless configured).
    Raises: IntegrityError when there are checkpoints and none verifies: a run must not silently start over.
    """
    faults = []
    for path in reversed(list(run)):
        fault = _fault(path)
        if fault is None:
            return path
        faults.append(fault)
        _log.warning("passed over a checkpoint: %s", fault)
    if not faults:
        return None
    raise IntegrityError(
        Path(run) / "checkpoints",
        expected="a checkpoint that verifies",
        came=f"{len(faults)} that do not",
        way_out="put a copy of one there, or remove them to start from the beginning",
        details="\n".join(f"  {fault}" for fault in faults),
    )


def _fault(path: Path) -> CheckpointError | None:
    """What is broken in a checkpoint. That this functrain is too old to read it is raised instead."""
    try:
        verify(path)
    except (IntegrityError, HeaderError, MissingError, StorageError) as fault:
        return fault
    return None


def every(n: int, run: Run, *, keep_last: int | None = 2, metadata: Mapping[str, Any] | None = None) -> Every:
    """Return a hook `(t, state, metrics)` that saves the state after every n-th step as RUN/checkpoints/step-%08d.

    After a save, checkpoints older than the newest `keep_last` that verify are removed (None: nothing is). The run is
    locked for this process as long as the hook lives.
    Raises: LockedError, StorageError, both at once and not at the first save.
    """
    if type(n) is not int or n < 1:
        raise ValueError(f"checkpoint.every: expected n of at least 1 step, came {n!r}; to save now, call hook.save")
    if keep_last is not None and (type(keep_last) is not int or keep_last < 1):
        raise ValueError(f"checkpoint.every: expected keep_last of at least 1, came {keep_last!r}; None keeps all")
    return Every(n, Path(run), keep_last, dict(metadata or {}))


class Every:
    """The hook that `every` returns."""

    def __init__(self, n: int, run: Path, keep_last: int | None, metadata: dict[str, Any]) -> None:
        self._n, self._run, self._keep_last, self._metadata = n, run, keep_last, metadata
        self._folder = run.absolute() / "checkpoints"
        try:
            staging.make_folder(self._folder)
        except OSError as error:
            way_out = "choose a run folder that can be made and written"
            raise StorageError(self._folder, expected="a folder", came=str(error), way_out=way_out) from error
        self._lock = lock.hold(self._folder)
        self._saved: int | None = None

    def __call__(self, t: int, state: Tree, metrics: Any = None) -> None:
        if t % self._n == 0:
            self.save(t, state)

    def save(self, t: int, state: Tree) -> Path:
        """Save the state as that of step t, whatever n is, apply retention, and return the checkpoint's path.

        A step that this hook saved last is not saved again: the end of a loop may fall on an n-th step.
        """
        if operator.index(t) < 0:
            raise ValueError(f"checkpoint.every: expected a number of steps done, came {t}")
        target = self._folder / f"step-{t:08d}"
        if t == self._saved:
            return self._run / "checkpoints" / target.name
        staging.remove_leftovers(self._folder, locked=True)
        if os.path.lexists(target):
            self._set_aside_if_broken(target)
        writing.save(target, state, metadata={**self._metadata, "step": t})
        self._saved = t
        self._retain()
        return self._run / "checkpoints" / target.name

    def _set_aside_if_broken(self, target: Path) -> None:
        fault = _fault(target)
        if fault is not None:
            aside = target.with_name(f"broken-{target.name}-{secrets.token_hex(4)}")
            _log.warning("a checkpoint is in the way, set aside as %s: %s", aside, fault)
            os.rename(target, aside)

    def _retain(self) -> None:
        rest = list(self._run)
        if self._keep_last is None or len(rest) <= self._keep_last:
            return
        kept = 0
        while rest and kept < self._keep_last:
            kept += _fault(rest.pop()) is None
        for path in rest:
            try:
                staging.remove(path)
            except OSError as error:
                way_out = "check the rights of the run folder"
                raise StorageError(path, expected="a folder to remove", came=str(error), way_out=way_out) from error
