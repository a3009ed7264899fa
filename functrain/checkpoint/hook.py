"""The hook that saves a run: every n steps, in the foreground or behind it, and then removes what need not stay."""

from __future__ import annotations

import logging
import operator
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from functrain.checkpoint import document, lock, run, staging, writing
from functrain.checkpoint.background import Background, Snapshots
from functrain.checkpoint.best import Ranks
from functrain.checkpoint.errors import ExistsError, StorageError
from functrain.checkpoint.reading import contents
from functrain.checkpoint.retention import Best, Known, Rules, retain
from functrain.checkpoint.run import NEW, Run
from functrain.tree import Tree

_log = logging.getLogger(__name__)


def every(
    n: int,
    run: Run,
    *,
    keep_last: int | None = 2,
    keep_every: int | None = None,
    keep_best: Best | None = None,
    asynchronous: bool = False,
    metadata: Mapping[str, Any] | None = None,
    max_file_bytes: int = writing.MAX_FILE_BYTES,
) -> Every:
    """Return a hook `(t, state, metrics)` that saves the state after every n-th step as RUN/checkpoints/step-%08d.

    After a save, checkpoints of this run older than the newest `keep_last` that verify are removed (None: nothing is),
    but not those of steps that are multiples of `keep_every`, nor the `keep_best` by a metric, nor the newest that
    was saved as an n-th one: however often a run is stopped in between, that is where `rewind` goes.

    With `keep_best=Best("validation_loss")`, a step whose metrics have this one and which is among the best so far is
    saved too, whatever n is; `ft.checkpoint.best(run)` finds it. Steps without the metric are never best, so measure it
    now and then: of a metric of each step, as "loss", each new best would be saved. Where it never came, `fit` raises a
    ValueError at its end that names the metrics that did.

    Asynchronous, the hook copies the state and returns, and a thread saves: the state may change at once. A save that
    fails is raised by the next one, by `wait`, or ends the program with code 1; at most two copies exist, and a third
    save waits for the first.

    The run is locked for this process as long as the hook lives.
    Raises: LockedError, StorageError, both at once and not at the first save; ValueError.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as run:
    ...     save = ft.checkpoint.every(100, run, keep_last=2)
    ...     for t in (100, 150, 200, 300):  # as ft.fit does after each step with every=[save]
    ...         save(t, {"w": torch.zeros(2)})
    ...     [path.name for path in ft.checkpoint.list(run)]
    ['step-00000200', 'step-00000300']
    """
    if type(n) is not int or n < 1:
        raise ValueError(f"checkpoint.every: expected n of at least 1 step, came {n!r}; to save now, call hook.save")
    rules = Rules(keep_last, keep_every, keep_best)
    rules.check()
    writing.check_max(max_file_bytes)
    ours = sorted({"step", "metrics", "keep_best"} & {*(metadata or ())})
    if ours:
        raise ValueError(f"checkpoint.every: expected metadata without {ours[0]!r}, which the hook writes; rename it")
    return Every(n, Path(run), rules, dict(metadata or {}), max_file_bytes, asynchronous=asynchronous)


class Every:
    """The hook that `every` returns."""

    def __init__(
        self, n: int, root: Path, rules: Rules, metadata: dict[str, Any], max_file_bytes: int, *, asynchronous: bool
    ) -> None:
        self.n, self._root, self._rules, self._metadata = n, root, rules, metadata
        self._max_file_bytes = max_file_bytes
        self._folder = root.absolute() / "checkpoints"
        document.check_metadata(metadata, str(self._folder))
        try:
            staging.make_folder(self._folder)
            staging.probe(self._folder)
            self._own(None)
        except OSError as error:
            way_out = "choose a run folder that can be made and written"
            came = str(error)
            raise StorageError(self._folder, expected="a folder to write", came=came, way_out=way_out) from error
        self._saved: int | None = None
        self._known = Known()
        self._ranks = None if rules.keep_best is None else Ranks(root, rules.keep_best)
        self._background = Background() if asynchronous else None
        self._snapshots = Snapshots()

    def __call__(self, t: int, state: Tree, metrics: Mapping[str, Any] | None = None) -> None:
        if self.due(t, metrics):
            self._begin(operator.index(t), state, metrics, {} if t % self.n == 0 else {"unplanned": True})

    def due(self, t: int, metrics: Mapping[str, Any] | None = None) -> bool:
        """Tell whether the hook saves after step t: an n-th one, or one of the best so far."""
        # not only where t is no multiple: it notes, too, which metrics there are
        best = self._ranks is not None and self._ranks.admits(operator.index(t), metrics, self._name)
        return best or t % self.n == 0

    def end(self, t: int) -> None:
        """Raise a ValueError where the metric of `keep_best` never came: the run is at its end."""
        if self._ranks is not None:
            self._ranks.check_came(self._name)

    def save(self, t: int, state: Tree, metrics: Mapping[str, Any] | None = None) -> Path:
        """Save the state as that of step t, whatever n is, apply retention, and return the checkpoint's path.

        All saves are on the disk when it returns. A step that this hook saved last is not saved again: the end of a
        loop may fall on an n-th step.
        Raises: CheckpointError, also that of an earlier asynchronous save.
        """
        t = operator.index(t)  # of a tensor or a number of numpy too
        if t < 0:
            raise ValueError(f"checkpoint.every: expected a number of steps done, came {t}")
        if t != self._saved:
            self._begin(t, state, metrics, {"unplanned": True})
        self.wait()
        return self._root / "checkpoints" / f"step-{t:08d}"

    def rewind(self, step: int) -> Path | None:
        """Return the newest checkpoint up to `step` that this run saved as an n-th one, and set later ones aside.

        None where there is none, and nothing is set aside. What `save` saved, because the run was stopped there, is
        passed over: a run that was not stopped has no such checkpoint, and goes back to the same one.
        """
        self.wait()
        for path in reversed(run.list(self._root)):
            if run.step_of(path) <= step and _is_of(path, self._name) and not _is_unplanned(path):
                self._leave_later(path)
                self._saved = None
                if self._ranks is not None:
                    self._ranks.forget()
                return path
        return None

    def wait(self) -> None:
        """Return when all saves are on the disk. Raises: what an asynchronous save raised."""
        if self._background is not None:
            self._background.wait()

    def _begin(self, t: int, state: Tree, metrics: Mapping[str, Any] | None, why: dict[str, bool]) -> None:
        target = self._folder / f"step-{t:08d}"
        best = {} if self._rules.keep_best is None else self._rules.keep_best.of(metrics)
        metadata = {**self._metadata, **best, **why, "step": t}
        drafted = writing.draft(state, str(target), metadata, self._name, self._max_file_bytes)
        if self._background is None:
            self._write(target, drafted)
        else:
            copy, done = self._snapshots.take(drafted)
            try:
                self._background.submit(self._job(target, copy, done))
            except BaseException:
                done()
                raise
        self._saved = t
        if self._ranks is not None:
            self._ranks.add(t, metrics, self._name)

    def _job(self, target: Path, copy: writing.Draft, done: Callable[[], None]) -> Callable[[], None]:
        def job() -> None:
            try:
                self._write(target, copy)
            except BaseException:
                self._saved = None
                raise
            finally:
                done()

        return job

    def _write(self, target: Path, drafted: writing.Draft) -> None:
        try:
            self._replace(target, drafted)
        except OSError as error:
            raise staging.told(error, target) from error

    def _own(self, name: str | None) -> None:
        """Lock the run, which if it is new gets this name or a random one."""
        self._lock = lock.hold(self._folder)
        self._name = run.identity(self._folder, name)
        # an earlier process may have been killed before it brought its names to the disk
        for folder in (self._folder, self._folder.parent, self._folder.parent.parent):
            staging.fsync_folder(folder)

    def _keep(self) -> None:
        if self._lock.is_there():
            self._lock.renew()
            return
        _log.warning("%s: moved or removed while it was in use; the run goes on in a new folder there", self._folder)
        staging.make_folder(self._folder)
        self._own(self._name)

    def _replace(self, target: Path, drafted: writing.Draft) -> None:
        self._keep()
        staging.remove_leftovers(self._folder, locked=run.OWN)
        new = target.with_name(target.name + NEW)
        self._settle(target, new)
        if os.path.lexists(target) and self._holds(target, drafted):
            staging.fsync_folder(self._folder)  # whoever saved it may have been killed before
        elif os.path.lexists(target) or self._later(target):
            writing.write(new, drafted)
            self._settle(target, new)
        else:
            writing.write(target, drafted)
        retain(self._root, self._rules, self._name, self._known)

    def _settle(self, target: Path, new: Path) -> None:
        """Bring `new`, when it is whole, to the place of `target`, and set later ones aside: this run went back.

        Killed at any instant, one of them is whole; and as long as `new` has this name, a next call makes an end of it.
        """
        for path in (target, new):
            found = run.fault(path) if os.path.lexists(path) else None
            if found is not None:
                self._set_aside(path, f"broken-{path.name}", str(found))
        if os.path.lexists(new):
            self._leave_later(target)
            if os.path.lexists(target):
                staging.remove(target)
            os.rename(new, target)
            staging.fsync_folder(self._folder)

    def _leave_later(self, target: Path) -> None:
        for path in self._later(target):
            self._set_aside(path, f"abandoned-{path.name}", f"the run went back to {target.name}")

    def _set_aside(self, path: Path, name: str, why: str) -> None:
        aside = path.with_name(f"{name}-{secrets.token_hex(4)}")
        _log.warning("a checkpoint was set aside as %s: %s", aside, why)
        os.rename(path, aside)
        staging.fsync_folder(self._folder)

    def _holds(self, target: Path, drafted: writing.Draft) -> bool:
        if writing.holds(target, drafted):
            return True
        if contents(target).run != self._name:
            came = "the checkpoint of another run"
            raise ExistsError(target, expected="none, or one of this run", came=came, way_out="move it elsewhere")
        return False

    def _later(self, target: Path) -> list[Path]:
        """Return whole checkpoints of this run after `target`, the last one last: it is the newest until it goes."""
        step = run.step_of(target)
        return [path for path in run.list(self._root) if run.step_of(path) > step and _is_of(path, self._name)]


def _is_of(path: Path, name: str) -> bool:
    return run.fault(path) is None and contents(path).run == name


def _is_unplanned(path: Path) -> bool:
    return "unplanned" in contents(path).metadata
