"""How far something is that takes long: what every such function tells whoever wants to show it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """A callback that is called as `progress(done, total)`: with 0 before the first part, with the total after the
    last.

    What is counted (tokens, documents, bytes) each function says. A total of None is not known before the end.
    """

    def __call__(self, done: int, total: int | None, /) -> object: ...


def counter(total: int | None, progress: Progress | None) -> Callable[[int], None]:
    """Return a function that adds to what is done, and tells it; the 0 is told at once."""
    done = 0
    if progress is None:
        return lambda more: None
    progress(done, total)

    def add(more: int) -> None:
        nonlocal done
        done += more
        progress(done, total)

    return add
