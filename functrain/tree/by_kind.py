"""Functions that treat leaves of one kind alike, so that a trace need run them only once a kind.

An update does the same to hundreds of leaves. Where its operations are recorded, those on one leaf say what they are
on the next one of the same shape.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Function = Callable[..., Any]


class _Here(threading.local):
    """Who traces in this thread: what makes of a function one that is run once a kind."""

    recorder: Callable[[Function], Function] | None = None


_here = _Here()


def once_a_kind(fn: Function) -> Function:
    """Return a function that equals `fn` for one pass over the rows of several trees' leaves.

    `fn` must be a function of its leaves' numbers: the same operations for leaves of the same shape, strides, dtype
    and device. It keeps no count, draws from no iterator and writes to none of its arguments.
    """
    return fn if _here.recorder is None else _here.recorder(fn)


@contextmanager
def recorded_by(recorder: Callable[[Function], Function] | None) -> Iterator[None]:
    """Let `once_a_kind` ask whoever records what runs inside."""
    before, _here.recorder = _here.recorder, recorder
    try:
        yield
    finally:
        _here.recorder = before
