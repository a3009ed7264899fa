"""A folder that appears whole or not at all: written beside its target, brought to the disk, then renamed.

Killed at any instant, the target is either absent or complete, and nothing else was touched.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from functrain.checkpoint.errors import ExistsError, StorageError

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.staging-(?P<host>[^/]+)-(?P<pid>\d+)-[0-9a-f]{8}")
_live: set[str] = set()  # the staging folders that this process is writing: a pid alone may be a reused one


@contextlib.contextmanager
def staged(target: Path, need_bytes: int = 0) -> Iterator[Path]:
    """Give a fresh folder to write and fsync files into; on leaving it becomes `target`, on an error it is removed.

    Raises: StorageError before anything is made where less than `need_bytes` are free, or with what the system said;
    ExistsError when the target has come into being.
    """
    _check_name(target)
    try:
        free_bytes = shutil.disk_usage(next(parent for parent in target.parents if parent.is_dir())).free
    except OSError as error:
        raise told(error, target) from error
    if need_bytes > free_bytes:
        raise _full(target, f"need {_size(need_bytes)}, free {_size(free_bytes)}")
    stage = _beside(target)
    _live.add(stage.name)
    try:
        make_folder(target.parent)
        remove_leftovers(target.parent, target.name)
        os.mkdir(stage)
        yield stage
        fsync_folder(stage)
        os.rename(stage, target)
        fsync_folder(target.parent)
    except BaseException as error:
        shutil.rmtree(stage, ignore_errors=True)
        if isinstance(error, OSError):
            raise told(error, target) from error
        raise
    finally:
        _live.discard(stage.name)


def _check_name(folder: Path) -> None:
    if "\0" in str(folder):
        raise StorageError(folder, expected="the name of a folder", came="one with a zero byte", way_out="rename it")


def _beside(target: Path) -> Path:
    name = f".{target.name}.staging-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    return target.with_name(name)


def _size(count: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} bytes"


def _full(target: Path, came: str) -> StorageError:
    return StorageError(target, expected="room on the disk", came=came, way_out="make room, or save elsewhere")


def probe(folder: Path) -> None:
    """Make and remove a folder there, so that a folder that cannot be written fails now and not at the first save."""
    stage = _beside(folder / "probe")
    _live.add(stage.name)
    try:
        os.mkdir(stage)
        os.rmdir(stage)
    finally:
        _live.discard(stage.name)


def write_file(path: Path, text: bytes) -> None:
    """Write a small file that appears whole or not at all."""
    stage = _beside(path)
    _live.add(stage.name)
    try:
        fd = os.open(stage, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            rest = memoryview(text)
            while len(rest):
                rest = rest[os.write(fd, rest) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(stage, path)
        fsync_folder(path.parent)
    except BaseException:
        stage.unlink(missing_ok=True)
        raise
    finally:
        _live.discard(stage.name)


def told(error: OSError, target: Path) -> ExistsError | StorageError:
    """Return the error that says what the system said of writing `target`."""
    taken = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)  # what rename says of a target that has come into being
    if error.errno in taken and os.path.lexists(target):
        return ExistsError(target, expected="no such folder yet", came="one that exists", way_out="choose another name")
    if error.errno == errno.ENOSPC:
        return _full(target, f"{error}, free {_size(shutil.disk_usage(target.parent).free)}")
    way_out = "check the disk, the rights and the name"
    return StorageError(target, expected="a folder that can be written", came=str(error), way_out=way_out)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, and bring each new name to the disk."""
    _check_name(folder)
    new = [p for p in (folder, *folder.parents) if not p.exists()]
    for path in reversed(new):
        path.mkdir(exist_ok=True)
        fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk; without it a crash of the machine may undo a rename."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(folder: Path) -> None:
    """Remove a folder so that, killed half way, what is left no longer has its name."""
    dying = _beside(folder)
    _live.add(dying.name)
    try:
        os.rename(folder, dying)
        fsync_folder(folder.parent)  # or a power cut gives the name back to what was half removed
        if dying.is_symlink():
            dying.unlink()  # what it leads to is somebody else's
        else:
            shutil.rmtree(dying)
    finally:
        _live.discard(dying.name)


def remove_leftovers(parent: Path, name: str | None = None, *, locked: re.Pattern[str] | None = None) -> None:
    """Remove staging folders, of target `name` or of all, whose process is dead.

    Another host's are left alone, unless they are of targets that `locked` fits: those of a run whose lock the caller
    holds, so that nobody else can be writing them.
    """
    for path in parent.glob(".*.staging-*"):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or path.name in _live or name not in (None, match["name"]):
            continue
        if (locked is not None and locked.fullmatch(match["name"])) or (
            match["host"] == socket.gethostname() and not _is_alive(int(match["pid"]))
        ):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # this process's own are in `_live`
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True
