"""One writer per run."""

from __future__ import annotations

import fcntl
import os
import socket
import weakref
from pathlib import Path

from functrain.checkpoint.errors import LockedError, StorageError

_WAY_OUT = "put the run where this user may write, on a file system with locks"
_held: weakref.WeakValueDictionary[tuple[str, int], Lock] = weakref.WeakValueDictionary()


class Lock:
    """A lock on a file, held by this process until the object is gone; the system lets go when the process dies.

    A record lock (fcntl), not flock: a forked data loader that outlives its parent must not keep the run locked.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise StorageError(path, expected="a lock file", came=str(error), way_out=_WAY_OUT) from error
        weakref.finalize(self, os.close, self._fd)
        self.renew()

    def renew(self) -> None:
        """Take the lock again: the system drops it when any code of this process closes the file, such as a copy of the
        whole folder.

        Raises: LockedError when another process took it meanwhile.
        """
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.pread(self._fd, 200, 0).decode(errors="replace").strip() or "another process"
            wait, came = "wait for it, stop it, or choose another run folder", f"a lock by {holder}"
            raise LockedError(self._path.parent, expected="no other writer", came=came, way_out=wait) from None
        except OSError as error:
            raise StorageError(self._path, expected="a lock on this file", came=str(error), way_out=_WAY_OUT) from error
        holder = f"host {socket.gethostname()}, process {os.getpid()}\n"
        if os.pread(self._fd, 200, 0) != holder.encode():
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, holder.encode(), 0)

    def is_there(self) -> bool:
        """Tell whether the file that is locked still stands at its path: a run folder may be moved or removed."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._fd))
        except OSError:
            return False


def hold(folder: Path) -> Lock:
    """Lock a folder's checkpoints for this process; holding the lock twice in one process gives the same lock.

    Raises: LockedError naming host and process of the other writer; StorageError where the folder has no locks.
    """
    # closing any descriptor of a file drops the process's record locks on it: so one descriptor per process
    key = (str(folder.resolve()), os.getpid())
    lock = _held.get(key)
    if lock is None or not lock.is_there():
        lock = Lock(folder / ".lock")
        _held[key] = lock
    return lock
