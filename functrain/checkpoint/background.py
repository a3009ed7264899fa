"""Saves on a thread: one after another, each from its own snapshot, none forgotten when the program ends."""

from __future__ import annotations

import atexit
import collections
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from functrain.checkpoint.writing import Draft, Part

_ALIGNMENT = 64  # bytes: of a cache line, and more than any element needs
_unseen: dict[Background, BaseException] = {}  # failures that no call has raised yet


class Background:
    """Jobs done in order on a thread that ends when there are none.

    The thread is no daemon: the interpreter waits for it. A failure is raised once, by the next `submit` or `wait`;
    when there is none before the program ends, it is printed and the program ends with 1.
    """

    def __init__(self) -> None:
        self._jobs: collections.deque[Callable[[], None]] = collections.deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Queue a job; raises what an earlier one raised instead."""
        with self._changed:
            self._raise_failure()
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="functrain-checkpoint")
                self._thread.start()

    def wait(self) -> None:
        """Return when all jobs are done; raises what one of them raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._thread is None)
            self._raise_failure()

    def _raise_failure(self) -> None:
        failure = _unseen.pop(self, None)
        if failure is not None:
            raise failure

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._jobs:
                    self._thread = None
                    self._changed.notify_all()
                    return
                job = self._jobs.popleft()
            try:
                job()
            except BaseException as error:  # whatever it is, another thread raises it
                _unseen.setdefault(self, error)


class Snapshots:
    """Copies of a draft's tensors in memory of the CPU, at most two at a time; memory is used again, for its pages cost
    more than the copy."""

    def __init__(self) -> None:
        self._free = threading.BoundedSemaphore(2)
        self._arenas: list[Tensor] = []

    def take(self, drafted: Draft) -> tuple[Draft, Callable[[], None]]:
        """Return the draft of copies, and what to call when it is no longer needed; waits while two are in use."""
        self._free.acquire()
        try:
            need = sum(_padded(t.nbytes) for part in drafted.files.values() for t in _tensors(part).values())
            arena = self._arenas.pop() if self._arenas else None
            if arena is None or arena.numel() < need:
                arena = torch.empty(need, dtype=torch.uint8)
            files: dict[str, Part] = {}
            at = 0
            for name, part in drafted.files.items():
                if isinstance(part, bytes):
                    files[name] = part
                    continue
                files[name] = copies = dict[str, Tensor]()
                for key, tensor in part.items():
                    copies[key] = _copy(tensor, arena[at : at + tensor.nbytes])
                    at += _padded(tensor.nbytes)
        except BaseException:
            self._free.release()
            raise
        return Draft(files, drafted.node), lambda: self._give_back(arena)

    def _give_back(self, arena: Tensor) -> None:
        self._arenas.append(arena)
        self._free.release()


def _tensors(part: Part) -> Mapping[str, Tensor]:
    return {} if isinstance(part, bytes) else part


def _padded(count: int) -> int:
    return count + -count % _ALIGNMENT


def _copy(tensor: Tensor, room: Tensor) -> Tensor:
    if tensor.numel() == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    made = room.view(tensor.dtype).view(tensor.shape)
    return made.copy_(tensor.detach())


def _tell_failures() -> None:
    for failure in _unseen.values():
        print("functrain: a checkpoint was not saved:", file=sys.stderr)
        traceback.print_exception(failure)
    if _unseen:
        # an exception in an exit handler leaves the program's code at 0, and then nobody notices
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            _flush(stream)
        os._exit(1)


def _flush(stream: Any) -> None:
    if stream is not None and not stream.closed:
        stream.flush()


atexit.register(_tell_failures)
