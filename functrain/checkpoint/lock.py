"""One writer per run."""

from __future__ import annotations

import fcntl
import os
import socket
import weakref
from pathlib import Path

from functrain.checkpoint.errors import LockedError, StorageError

_held: weakref.WeakValueDictionary[tuple[str, int], Lock] = weakref.WeakValueDictionary()


class Lock:
    """A lock on a file, held by this process until the object is gone; the system lets go when the process dies.

    A record lock (fcntl), not flock: a forked data loader that outlives its parent must not keep the run locked.
    """

    def __init__(self, path: Path) -> None:
        way_out = "put the run where this user may write, on a file system with locks"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise StorageError(path, expected="a lock file", came=str(error), way_out=way_out) from error
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.read(fd, 200).decode(errors="replace").strip() or "another process"
            os.close(fd)
            wait, came = "wait for it, stop it, or choose another run folder", f"a lock by {holder}"
            raise LockedError(path.parent, expected="no other writer", came=came, way_out=wait) from None
        except OSError as error:
            os.close(fd)
            raise StorageError(path, expected="a lock on this file", came=str(error), way_out=way_out) from error
        os.ftruncate(fd, 0)
        os.write(fd, f"host {socket.gethostname()}, process {os.getpid()}\n".encode())
        weakref.finalize(self, os.close, fd)


def hold(folder: Path) -> Lock:
    """Lock a folder's checkpoints for this process; holding the lock twice in one process gives the same lock.

    Raises: LockedError naming host and process of the other writer; StorageError where the folder has no locks.
    """
    # closing any descriptor of a file drops the process's record locks on it: so one descriptor per process
    key = (str(folder.resolve()), os.getpid())
    lock = _held.get(key)
    if lock is None:
        lock = Lock(folder / ".lock")
        _held[key] = lock
    return lock
