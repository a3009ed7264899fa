"""Signals that ask a loop to stop: noted while a step runs, and told to the loop between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """Remember the first stopping signal while the block runs, in the main thread; elsewhere do nothing."""

    def __init__(self) -> None:
        self.first: int | None = None
        self._in_step = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for signum in STOPPING_SIGNALS:
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signum, handler = self._before.popitem()
            # None stands for a handler that C code set, which Python cannot put back
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)

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
            # a third one must end what hangs on the way out, such as a thread that reads
            self.__exit__()
            raise KeyboardInterrupt
        if self.first is None:
            self.first = signum
