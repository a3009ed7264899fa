"""The checkpoints of a run: RUN/checkpoints/step-00000500, and the newest whole one found again."""

from __future__ import annotations

import builtins
import functools
import logging
import os
import re
import secrets
from pathlib import Path

from functrain.checkpoint import document, staging, strict_json
from functrain.checkpoint.crew import ALONE, Crew
from functrain.checkpoint.errors import CheckpointError, HeaderError, IntegrityError, MissingError, StorageError
from functrain.checkpoint.reading import verify, verify_share
from functrain.checkpoint.stream import Source
from functrain.sharding import Plan

Run = str | os.PathLike[str]
NEW = ".new"  # ends the name of a checkpoint that is about to replace that of the same step
OWN = re.compile(r"step-\d{8,}(\.new)?|run\.json|probe")  # what only the holder of the run's lock writes
OWN_METADATA = {"step", "metrics", "keep_best", "unplanned"}  # what `every` adds to that of the caller
_STEP = re.compile(rf"step-(?P<step>\d{{8,}})(?P<new>{re.escape(NEW)})?")
_IDENTITY = "run.json"
_log = logging.getLogger(__name__)


def list(run: Run) -> builtins.list[Path]:
    """Return the run's checkpoint folders, oldest step first, without looking inside. Raises: StorageError.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as run:
    ...     ft.checkpoint.every(100, run)(100, {"w": torch.zeros(2)})
    ...     [path.name for path in ft.checkpoint.list(run)]
    ['step-00000100']
    """
    folder = Path(run) / "checkpoints"
    try:
        found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        way_out = "check the name and the rights"
        raise StorageError(folder, expected="a folder to read", came=str(error), way_out=way_out) from error
    return sorted(found, key=lambda path: (step_of(path), path.name.endswith(NEW)))


def step_of(path: Path) -> int:
    """Return the step that a checkpoint of a run is named after."""
    match = _STEP.fullmatch(path.name)
    assert match is not None, path
    return int(match["step"])


def latest(run: Run, *, plan: Plan | None = None) -> Path | None:
    """Return the newest checkpoint of which every byte verifies, or None when the run has none.

    Newer ones that do not verify are passed over, each with a message through `logging` (on stderr unless configured).
    With `plan`, every rank must call it, each verifies some of the files, and all get the same path.
    Raises: IntegrityError when there are checkpoints and none verifies: a run must not silently start over.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as run:
    ...     ft.checkpoint.every(100, run)(100, {"w": torch.zeros(2)})
    ...     ft.checkpoint.latest(run).name
    'step-00000100'
    """
    crew = Crew(plan)
    faults: builtins.list[CheckpointError] = []
    there: builtins.list[Path] = []
    while (now := crew.led(run, lambda: list(run))) != there:
        # another process may train: what was listed is removed while it is read here, and newer ones have come
        there, faults = now, []
        for path in reversed(there):
            found = fault(path, crew)
            if found is None:
                return path
            if crew.led(path, functools.partial(os.path.lexists, path)):
                faults.append(found)
                if crew.leads:
                    _log.warning("passed over a checkpoint: %s", found)
    if not faults:
        return None
    raise IntegrityError(
        Path(run) / "checkpoints",
        expected="a checkpoint that verifies",
        came=f"{len(faults)} that do not",
        way_out="put a copy of one there, or remove them to start from the beginning",
        details="\n".join(f"  {found}" for found in faults),
    )


def fault(path: Path, crew: Crew = ALONE) -> CheckpointError | None:
    """Return what is broken in a checkpoint. That this functrain is too old to read it is raised instead."""
    try:
        if crew.count == 1:
            verify(path)
        else:
            verify_share(path, crew)
    except (IntegrityError, HeaderError, MissingError, StorageError) as found:
        return found
    return None


def identity(folder: Path, new: str | None = None) -> str:
    """Return the run's own name, which its checkpoints carry: made when a run first saves, `new` or a random one.

    The caller holds the run's lock. Raises: IntegrityError, StorageError.
    """
    path = folder / _IDENTITY
    if not path.exists():
        name = new or secrets.token_hex(16)
        staging.write_file(path, strict_json.dumps({"run": name}) + b"\n")
        return name

    def refuse(expected: str, came: str, key: str | None) -> IntegrityError:
        way_out = "remove it: the run then gets a new name, and leaves its older checkpoints alone"
        return IntegrityError(path, path=key, expected=expected, came=came, way_out=way_out)

    with Source(path, links=False, record=None) as source:
        if source.size_bytes > 1000:
            raise refuse("the name of a run", f"{source.size_bytes} bytes", None)
        table = strict_json.loads(source.take(source.size_bytes), refuse)
    if set(table) != {"run"} or not document.is_run(table["run"]):
        raise refuse("the name of a run", "something else", "run")
    return str(table["run"])
