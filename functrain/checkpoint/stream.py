"""Files written once and read once, front to back, with sha256 on the way."""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import stat
import threading
from pathlib import Path
from typing import NamedTuple

from functrain.checkpoint.errors import IntegrityError, StorageError

CHUNK_BYTES = 1 << 23  # 8 MiB: long enough that a second thread pays, short enough to stay in the cache


class Record(NamedTuple):
    """What the manifest keeps of a file."""

    size_bytes: int
    sha256: str


class Sink:
    """A new file that hashes what is written to it. Small pieces are gathered, long ones go straight to the disk."""

    def __init__(self, path: Path | None) -> None:
        self._fd = None if path is None else os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._digest, self._size, self._gathered = Digest(), 0, bytearray()

    def write(self, piece: memoryview) -> None:
        self._size += len(piece)
        if len(self._gathered) + len(piece) <= CHUNK_BYTES:
            self._gathered += piece
            return
        self._flush()
        self._put(piece)

    def finish(self) -> Record:
        """Bring everything to the disk and return the size and checksum."""
        self._flush()
        if self._fd is not None:
            os.fsync(self._fd)
        return Record(self._size, self._digest.hex())

    def close(self) -> None:
        self._digest.close()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _flush(self) -> None:
        gathered, self._gathered = memoryview(self._gathered), bytearray()
        self._put(gathered)

    def _put(self, piece: memoryview) -> None:
        self._digest.update(piece)
        while self._fd is not None and len(piece):
            piece = piece[os.write(self._fd, piece) :]


class Digest:
    """sha256 of a stream; a long piece is hashed on another thread while the caller goes on with the next.

    Its own thread, not an executor: an executor takes no work once the program ends, when a save may still be running.
    """

    def __init__(self) -> None:
        self._sha = hashlib.sha256()
        self._thread: threading.Thread | None = None
        self._todo: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._running = False

    def update(self, piece: memoryview) -> None:
        """Take the next piece; its bytes must not change before the next call."""
        self._wait()
        if len(piece) < CHUNK_BYTES:
            self._sha.update(piece)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._hash, name="functrain-sha256", daemon=True)
            self._thread.start()
        self._running = True
        self._todo.put(piece)

    def hex(self) -> str:
        self._wait()
        return self._sha.hexdigest()

    def close(self) -> None:
        if self._thread is not None:
            self._todo.put(None)
            self._thread.join()
            self._thread = None

    def _hash(self) -> None:
        while (piece := self._todo.get()) is not None:
            self._sha.update(piece)
            del piece  # or the tensor's memory lives until the next one comes
            self._done.put(None)

    def _wait(self) -> None:
        if self._running:
            self._done.get()
            self._running = False


class Source:
    """An open regular file that is read once, front to back, and hashed on the way when a `record` is given.

    Not `hashed`, only its size is compared with the record.
    """

    def __init__(self, path: Path, *, links: bool, record: Record | None, hashed: bool = True) -> None:
        self._path, self._record, self._digest = path, record if hashed else None, Digest()
        self._fd = _open(path, links=links)
        self.size_bytes = os.fstat(self._fd).st_size
        if record is not None and self.size_bytes != record.size_bytes:
            os.close(self._fd)
            raise changed(path, f"{record.size_bytes} bytes", f"{self.size_bytes}")

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._digest.close()
        os.close(self._fd)

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        room = bytearray(count)
        self.fill(memoryview(room))
        return bytes(room)

    def fill(self, room: memoryview) -> None:
        """Fill `room` with the next bytes."""
        for at in range(0, len(room), CHUNK_BYTES):
            chunk = room[at : at + CHUNK_BYTES]
            got = 0
            while got < len(chunk):
                count = self._readv(chunk[got:])
                if count == 0:
                    raise changed(self._path, f"{self.size_bytes} bytes", "fewer: it shrank while it was read")
                got += count
            if self._record is not None:
                self._digest.update(chunk)

    def _readv(self, room: memoryview) -> int:
        try:
            return os.readv(self._fd, [room])
        except OSError as error:
            way_out = "check the disk; use an older checkpoint or a copy of this one"
            raise StorageError(self._path, expected="bytes", came=str(error), way_out=way_out) from error

    def skip(self, count: int) -> None:
        """Pass over `count` bytes, which are hashed all the same."""
        if self._record is None:
            os.lseek(self._fd, count, os.SEEK_CUR)
            return
        for at in range(0, count, CHUNK_BYTES):
            self.fill(memoryview(bytearray(min(CHUNK_BYTES, count - at))))

    def finish(self) -> None:
        """Compare the bytes that were read with the record."""
        if self._record is not None and self._digest.hex() != self._record.sha256:
            raise changed(self._path, f"sha256 {self._record.sha256}", self._digest.hex())


def is_there(path: Path) -> bool:
    """Tell whether there is such a file or folder.

    Raises: StorageError when the system will not say, which is not "no": of a folder that may not be searched, say.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            return False
        raise _unreadable(path, str(error)) from error
    return True


def _unreadable(path: Path, came: str) -> StorageError:
    return StorageError(path, expected="a readable file or folder", came=came, way_out="check the name and the rights")


def _open(path: Path, *, links: bool) -> int:
    # O_NONBLOCK: opening a pipe that nobody writes must not wait for ever
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if links else os.O_NOFOLLOW)
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        raise changed(path, "a file", "none") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            came, way_out = "a symbolic link", "put the file itself there"
            raise StorageError(path, expected="a readable file", came=came, way_out=way_out) from error
        raise _unreadable(path, str(error)) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise StorageError(path, expected="a regular file", came="a folder, pipe or device", way_out="name a file")
    return fd


def changed(path: Path, expected: str, came: str) -> IntegrityError:
    return IntegrityError(path, expected=expected, came=came, way_out="use an older checkpoint or a copy of this one")
