"""Options of a command from its words: tyro over frozen dataclasses, with errors of one line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import shutil
import typing
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import tyro

T = TypeVar("T")


class UsageError(ValueError):
    """The command was asked for something that it does not have."""


def parse(
    cls: type[T],
    words: Sequence[str],
    *,
    prog: str,
    description: str,
    default: T | None = None,
    beside: Sequence[str] = (),
) -> T:
    """Read a dataclass from the words of a command line; `--help` prints and exits.

    `beside` are options that were taken out before, and may have been meant.

    Raises: UsageError in one line.
    """
    said = io.StringIO()
    try:
        # tyro draws its errors as a box on stderr; a wide terminal keeps a sentence on a line
        with contextlib.redirect_stderr(said), _wide(not {"-h", "--help"} & set(words)):
            # a table of several kinds is that of its default, and no command of its own
            kinds = (tyro.conf.AvoidSubcommands,)
            if default is None:
                return tyro.cli(cls, args=words, prog=prog, description=description, config=kinds)
            return tyro.cli(cls, args=words, prog=prog, description=description, default=default, config=kinds)
    except SystemExit as stop:
        if not stop.code:
            raise
    command = " ".join(prog.split()[:2])
    raise UsageError(f"{_first_sentence(said.getvalue(), [*_names(cls, default), *beside])} (see {command} --help)")


def if_given(metavar: str) -> Any:
    """Annotate an option that may be left out: its help shows what it takes, and no `(default: None)`."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


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


def _first_sentence(box: str, names: list[str]) -> str:
    """Take the error out of tyro's box, drawn in lines or, where the output is no UTF-8, in spaces and dashes."""
    drawn = "│" in box
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith("│" if drawn else " ")]
    parts: list[list[str]] = [[]]
    for line in lines:
        if line and set(line) <= {"─", "-"}:
            parts.append([])
        elif line:
            parts[-1].append(line)
    said = " ".join(parts[0 if drawn else 1])  # without lines, the title is a part of its own
    if said.startswith("Unrecognized"):
        unknown = re.search(r"--[\w.-]+", said)
        meant = unknown and suggestion(unknown.group(), names)
        return said + (f"; did you mean {meant}?" if meant else "")
    # what a config says of its own numbers names them itself
    return re.sub(r"^Error parsing (?!-)\S+: ", "", said).partition(". Got errors:")[0]


def suggestion(word: str, names: Sequence[str]) -> str | None:
    """Return the option that `word` means: by its last part first, as `--lr` is `--optimizer.learning-rate`
    where no other is called so, then by the whole."""
    word = word.replace("_", "-")
    last = _last(word)
    for found in (
        [name for name in names if _last(name) == last],
        [name for name in names if "".join(part[:1] for part in _last(name).split("-")) == last],
        [name for name in names if _last(name) in difflib.get_close_matches(last, map(_last, names), 1)],
        [name for name in names if last in _last(name).split("-")],
    ):
        if found:
            return max(found, key=lambda name: difflib.SequenceMatcher(None, name, word).ratio())
    return next(iter(difflib.get_close_matches(word, names, 1)), None)


def _last(name: str) -> str:
    return name.lstrip("-").rpartition(".")[2]


def _names(cls: Any, default: Any = None, above: str = "") -> Iterator[str]:
    """Give the options that tyro makes of a dataclass; of a table of several kinds the default's."""
    for field, hint in typing.get_type_hints(cls, include_extras=True).items():
        kind, marks = getattr(hint, "__origin__", hint), getattr(hint, "__metadata__", ())
        value = getattr(default, field, None)
        of_several = [one for one in typing.get_args(hint) if dataclasses.is_dataclass(one)] if not marks else []
        if of_several:
            kind = of_several[0] if value is None else type(value)
        name = next((mark.name for mark in marks if getattr(mark, "name", None) is not None), field.replace("_", "-"))
        if dataclasses.is_dataclass(kind):
            yield from _names(kind, value, f"{above}{name}." if name else above)
        elif not _POSITIONAL & set(marks):
            yield f"--{above}{name}"
            if kind is bool and not marks:
                yield f"--{above}no-{name}"


_POSITIONAL = set(typing.get_args(tyro.conf.Positional[str])[1:])
