"""Signals that ask a loop to stop: noted while a step runs, and told to the loop between two steps."""

from __future__ import annotations

import atexit
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import distributed

STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """Remember the first stopping signal while the block runs, in the main thread; elsewhere do nothing."""

    def __init__(self) -> None:
        self.first: int | None = None
        self._in_step = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for signum in STOPPING_SIGNALS:
                if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                    continue  # nohup: the program outlives its terminal
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            # None stands for a handler that C code set, which Python cannot put back
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def stop(self, device: torch.device, *, wanted: bool = False) -> bool:
        """Tell whether a signal has come or a stop is wanted, in every rank alike: one in any of them stops all after
        the same step.

        Where torch.distributed runs, this waits for all ranks, and for the device.
        """
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            atexit.unregister(_leave_the_group)  # so that it is there once
            atexit.register(_leave_the_group)
            found = torch.tensor([self.first or 0, wanted], device=device)
            distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
            agreed, wanted = found.tolist()
            # one that came here since is for the next time: the other ranks do not know of it
            self.first = agreed or self.first
            return bool(agreed or wanted)
        return wanted or self.first is not None

    @contextmanager
    def second_sigint_raises(self) -> Generator[None]:
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False

    def _note(self, signum: int, frame: FrameType | None) -> None:
        # SIGTERM twice is one wish: a process group and its `make` both deliver it
        if self._in_step and self.first == signum == signal.SIGINT:
            raise KeyboardInterrupt
        if self.first is None:
            self.first = signum


def _leave_the_group() -> None:
    """End the threads of torch.distributed while Python still runs.

    A thread of gloo's that lets go of the last reference to a tensor needs the interpreter's lock. When the interpreter
    begins to end in that moment, the thread is unwound through a function that may not throw, and the process aborts
    (-6, "terminate called without an active exception") in place of ending with its own code.
    """
    # after an error of this rank another backend may wait for the others, who do not know of it
    if distributed.is_initialized() and (
        getattr(sys, "last_value", None) is None or distributed.get_backend() == "gloo"
    ):
        distributed.destroy_process_group()
