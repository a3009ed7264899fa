"""What a recipe shows, kept for tests."""

from __future__ import annotations

from typing import Any


class Shown:
    def __init__(self) -> None:
        self.notes = list[str]()
        self.rows = list[Any]()
        self.done: int | None = None  # steps, when the run began
        self.evaluated: tuple[int, int] | None = None  # batches of an evaluation: done, and in all

    def begin(self, done: int, steps: int) -> None:
        self.done = done

    def note(self, text: str) -> None:
        self.notes.append(text)

    def row(self, row: Any) -> None:
        self.rows.append(row)

    def evaluating(self, done: int, batches: int) -> None:
        self.evaluated = (done, batches)

    def end(self) -> None: ...
