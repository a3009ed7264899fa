"""Programs in a row, what a large function is compiled to. Values have numbered slots, emptied after their last use."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from functrain.compiler.inductor.lowering import Kernel


class Line(NamedTuple):
    """One call of a program."""

    name: str
    program: Kernel
    given: list[int]  # slots of what it takes
    made: list[int]  # slots of what it returns; -1 for what is nobody's
    operations: int  # of the graph that it was compiled from
    kept_bytes: int  # of what it returns for a backward pass alone


class Listing:
    """Programs, run one after another. Called with a list of inputs, which it empties; returns a list of results."""

    def __init__(self, inputs: Sequence[Hashable]) -> None:
        self.lines: list[Line] = []
        self._slots: dict[Hashable, int] = {value: i for i, value in enumerate(inputs)}
        self._start: list[tuple[int, Any]] = []
        self._results: list[int] = []
        self._plan: list[Any] = []

    def constant(self, value: Any) -> Hashable:
        """Add a value that is there at the start."""
        key = object()
        self._start.append((self._slot(key), value))
        return key

    def add(
        self,
        name: str,
        program: Kernel,
        inputs: Sequence[Hashable],
        results: Sequence[Hashable | None],
        operations: int = 1,
        kept_bytes: int = 0,
    ) -> None:
        """Add a program; a result that is None is nobody's."""
        given = [self._slots[value] for value in inputs]
        made = [-1 if r is None else self._slot(r) for r in results]
        self.lines.append(Line(name, program, given, made, operations, kept_bytes))

    def finish(self, results: Sequence[Hashable]) -> Listing:
        """Say what the list returns."""
        self._results = [self._slots[r] for r in results]
        kept = {*self._results}
        last = {slot: i for i, line in enumerate(self.lines) for slot in line.given}
        self._plan = [
            (line.program, line.given, line.made, [s for s in {*line.given} if last[s] == i and s not in kept])
            for i, line in enumerate(self.lines)
        ]
        return self

    def describe(self, indent: str = "") -> list[str]:
        """Return a line for each call, and those of a list within it; equal calls in a row are one."""
        rows: list[str] = []
        for (name, program, operations, kept), calls in itertools.groupby(self.lines, _alike):
            count = len(list(calls))
            times = f" x {count}" if count > 1 else ""
            keeps = f"  keeps {kept:,} bytes" if kept else ""
            inner = isinstance(program, Listing)
            rows.append(f"{indent}{name}{times}" + ("" if inner else f"  {operations} operations{keeps}"))
            if isinstance(program, Listing):
                rows += program.describe(indent + "  ")
        return rows

    def _slot(self, value: Hashable) -> int:
        return self._slots.setdefault(value, len(self._slots))

    def __call__(self, inputs: list[Any]) -> list[Any]:
        values: list[Any] = [*inputs, *[None] * (len(self._slots) - len(inputs))]
        inputs.clear()
        for slot, value in self._start:
            values[slot] = value
        for program, given, made, done in self._plan:
            arguments = [values[slot] for slot in given]
            for slot in done:
                values[slot] = None
            _store(values, made, program(arguments))
        return [values[slot] for slot in self._results]


def _store(values: list[Any], slots: list[int], results: Sequence[Any]) -> None:
    """In a frame of its own, which holds no result of one program while the next runs."""
    for slot, value in zip(slots, results, strict=True):
        if slot >= 0:
            values[slot] = value


def _alike(line: Line) -> Any:
    return line.name, line.program, line.operations, line.kept_bytes
