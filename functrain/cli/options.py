"""Options of a command from its words: tyro over frozen dataclasses, with errors of one line."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Sequence
from typing import TypeVar

import tyro

T = TypeVar("T")


class UsageError(ValueError):
    """The command was asked for something that it does not have."""


def parse(cls: type[T], words: Sequence[str], *, prog: str, description: str, default: T | None = None) -> T:
    """Read a dataclass from the words of a command line; `--help` prints and exits.

    Raises: UsageError in one line.
    """
    said = io.StringIO()
    try:
        # tyro draws its errors as a box on stderr; a wide terminal keeps a sentence on a line
        with contextlib.redirect_stderr(said), _wide(not {"-h", "--help"} & set(words)):
            if default is None:
                return tyro.cli(cls, args=words, prog=prog, description=description)
            return tyro.cli(cls, args=words, prog=prog, description=description, default=default)
    except SystemExit as stop:
        if not stop.code:
            raise
    raise UsageError(f"{_first_sentence(said.getvalue())} (see {prog} --help)")


@contextlib.contextmanager
def _wide(wide: bool):  # type: ignore[no-untyped-def]
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000" if wide else str(shutil.get_terminal_size((100, 24)).columns)
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _first_sentence(box: str) -> str:
    """Take the error out of tyro's box, drawn in lines or, where the output is no UTF-8, in spaces and dashes."""
    drawn = "│" in box
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith("│" if drawn else " ")]
    parts: list[list[str]] = [[]]
    for line in lines:
        if line and set(line) <= {"─", "-"}:
            parts.append([])
        elif line:
            parts[-1].append(line)
    said, *rest = parts if drawn else parts[1:]  # without lines, the title is a part of its own
    close = [line for part in rest for line in part if line.startswith("--")]
    unknown = said and said[0].startswith("Unrecognized")
    return " ".join(said) + (f"; did you mean {close[0].split()[0].rstrip(',')}?" if unknown and close else "")
