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
from functrain.checkpoint.crew import Crew
from functrain.checkpoint.errors import ExistsError, StorageError
from functrain.checkpoint.reading import contents
from functrain.checkpoint.retention import Best, Known, Rules, retain
from functrain.checkpoint.run import NEW, Run
from functrain.sharding import Plan
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
    plan: Plan | None = None,
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

    With `plan`, every rank must make and call the hook, with a folder that all of them see: each writes its parts of
    what is split, the first one the rest, and a checkpoint has its name when all have written. The run is locked for
    this process, or the first rank's, as long as the hook lives.
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
    return Every(n, Path(run), rules, dict(metadata or {}), max_file_bytes, plan, asynchronous=asynchronous)


class Every:
    """The hook that `every` returns."""

    def __init__(
        self,
        n: int,
        root: Path,
        rules: Rules,
        metadata: dict[str, Any],
        max_file_bytes: int,
        plan: Plan | None = None,
        *,
        asynchronous: bool,
    ) -> None:
        crew = Crew(plan, own_group=True)
        self.n, self.plan, self._root, self._rules, self._metadata = n, plan, root, rules, metadata
        # a thread that saves has its own group: this one may ask something beside it
        self._crew, self._savers = crew, Crew(plan, own_group=True) if asynchronous else crew
        self._max_file_bytes = max_file_bytes
        self._folder = root.absolute() / "checkpoints"
        document.check_metadata(metadata, str(self._folder))
        self._name = crew.led(self._folder, self._begun)
        self._saved: int | None = None
        self._known = Known()
        self._ranks = None if rules.keep_best is None else Ranks(root, rules.keep_best)
        self._background = Background() if asynchronous else None
        self._snapshots = Snapshots()

    def _begun(self) -> str:
        try:
            staging.make_folder(self._folder)
            staging.probe(self._folder)
            return self._own(None)
        except OSError as error:
            how = {"expected": "a folder to write", "way_out": "choose a run folder that can be made and written"}
            raise StorageError(self._folder, came=str(error), **how) from error

    def __call__(self, t: int, state: Tree, metrics: Mapping[str, Any] | None = None) -> None:
        if self.due(t, metrics):
            self._begin(operator.index(t), state, metrics, {} if t % self.n == 0 else {"unplanned": True})

    def due(self, t: int, metrics: Mapping[str, Any] | None = None) -> bool:
        """Tell whether the hook saves after step t: an n-th one, or one of the best so far."""
        # not only where t is no multiple: it notes, too, which metrics there are
        best = self._ranks is not None and self._admits(self._ranks, operator.index(t), metrics)
        return best or t % self.n == 0

    def _admits(self, ranks: Ranks, t: int, metrics: Mapping[str, Any] | None) -> bool:
        assert self._rules.keep_best is not None
        if not metrics or self._rules.keep_best.metric not in metrics:  # on no rank
            return ranks.admits(t, metrics, self._name)
        # the others would see in the folder what the first one is about to do
        return self._crew.led(self._folder, lambda: ranks.admits(t, metrics, self._name)) or False

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
        found = self._crew.led(self._folder, lambda: self._rewound(step))
        if found is not None:
            self._saved = None
            if self._ranks is not None:
                self._ranks.forget()
        return found

    def _rewound(self, step: int) -> Path | None:
        for path in reversed(run.list(self._root)):
            if run.step_of(path) <= step and _is_of(path, self._name) and not _is_unplanned(path):
                self._leave_later(path)
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
        how = (str(target), metadata, self._name, self._max_file_bytes, self._crew)
        drafted = self._crew.each(target, lambda: writing.draft(state, *how))
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

    def _own(self, name: str | None) -> str:
        """Lock the run, which if it is new gets this name or a random one, and return its name."""
        self._lock = lock.hold(self._folder)
        own = run.identity(self._folder, name)
        # an earlier process may have been killed before it brought its names to the disk
        for folder in (self._folder, self._folder.parent, self._folder.parent.parent):
            staging.fsync_folder(folder)
        return own

    def _keep(self) -> None:
        if self._lock.is_there():
            self._lock.renew()
            return
        _log.warning("%s: moved or removed while it was in use; the run goes on in a new folder there", self._folder)
        staging.make_folder(self._folder)
        self._name = self._own(self._name)

    def _replace(self, target: Path, drafted: writing.Draft) -> None:
        crew, new = self._savers, target.with_name(target.name + NEW)
        there = crew.led(target, lambda: self._ready(target, new))
        if there and self._holds(target, drafted):
            crew.led(target, lambda: staging.fsync_folder(self._folder))  # whoever saved it may have been killed before
        elif there or crew.led(target, lambda: bool(self._later(target))):
            writing.write(new, drafted, crew)
            crew.led(target, lambda: self._settle(target, new))
        else:
            writing.write(target, drafted, crew)
        crew.led(target, lambda: retain(self._root, self._rules, self._name, self._known))

    def _ready(self, target: Path, new: Path) -> bool:
        """Make an end of what was begun before; tell whether the target is there."""
        self._keep()
        staging.remove_leftovers(self._folder, locked=run.OWN)
        self._settle(target, new)
        return os.path.lexists(target)

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
        if writing.holds(target, drafted, self._savers):
            return True

        def check() -> None:
            if contents(target).run != self._name:
                how = {"expected": "none, or one of this run", "way_out": "move it elsewhere"}
                raise ExistsError(target, came="the checkpoint of another run", **how)

        self._savers.led(target, check)
        return False

    def _later(self, target: Path) -> list[Path]:
        """Return whole checkpoints of this run after `target`, the last one last: it is the newest until it goes."""
        step = run.step_of(target)
        return [path for path in run.list(self._root) if run.step_of(path) > step and _is_of(path, self._name)]


def _is_of(path: Path, name: str) -> bool:
    return run.fault(path) is None and contents(path).run == name


def _is_unplanned(path: Path) -> bool:
    return "unplanned" in contents(path).metadata
