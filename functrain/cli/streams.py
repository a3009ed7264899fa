"""The command's output where it is closed, lost or no UTF-8: what is shown may get lost, what is done may not."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


def settle() -> None:
    """Make sure that there are three streams, and that every character can be written to them in some way."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # else the next file that is opened would get its number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def enduring() -> Iterator[None]:
    """Go on when nobody reads what is written: a pipe's reader has left, a terminal is gone."""
    with (
        contextlib.redirect_stdout(_Enduring(sys.stdout)),
        contextlib.redirect_stderr(_Enduring(sys.stderr)),
    ):
        yield


class _Enduring:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            drop(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            drop(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def drop(stream: TextIO) -> None:
    """Send what waits in a stream, and all that will come, nowhere: Python flushes it at exit, and would fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
