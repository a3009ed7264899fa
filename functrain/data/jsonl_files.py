"""JSON Lines files as dicts of columns: an object on each line, all with the same fields."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from functrain.data.tables import Table, check_names, existing

_Where: TypeAlias = Callable[[int], str]  # of a row: its file and line


def read_jsonl(path: str | Path, *, columns: Sequence[str] | None = None) -> Table:
    r"""Read a JSON Lines file into a dict of columns, arrays of N rows, or only those columns that are named.

    Whole numbers are int64, numbers of which one is not whole float64, text is an array of `str` objects, lists of
    numbers of one shape are an array (N, ...), and objects within are dicts of columns. Empty lines are passed over. A
    file may be packed, as `.jsonl.gz`.

    Raises: ValueError naming the file, the line and the field of what is no JSON, is missing, or is of another kind or
    length than in the first row.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     _ = Path(folder, "rows.jsonl").write_text('{"text": "good", "label": 1}\n{"text": "bad", "label": 0}\n')
    ...     table = ft.data.read_jsonl(f"{folder}/rows.jsonl")
    >>> table["text"].tolist(), table["label"]
    (['good', 'bad'], array([1, 0]))
    """
    path = existing(path, "read_jsonl")
    lines: list[int] = []
    rows: list[Any] = []
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for line, content in enumerate(file, 1):
            if not content.strip():
                continue
            row = _parsed(content, f"{path}, line {line}")
            if columns is not None:
                check_names(list(row), columns, f"{path}, line {line}")
                row = {name: row[name] for name in columns}
            lines.append(line)
            rows.append(row)
    if not rows:
        raise ValueError(f"{path}: expected an object on each line, came only empty lines")
    return _objects(rows, "", lambda number: f"{path}, line {lines[number]}")


def _parsed(content: bytes, where: str) -> Any:
    try:
        row = json.loads(content.removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:
        raise ValueError(f"{where}: expected a JSON object, came {content[:60]!r} ({error}); mend the line") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object with a field for each column, came {content[:60]!r}")
    return row


def _objects(rows: Sequence[Any], path: str, where: _Where) -> Table:
    fields = rows[0].keys()
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or row.keys() != fields:
            came = ", ".join(row) if isinstance(row, dict) else repr(row)
            at = f"{where(number)}: {path}" if path else where(number)
            raise ValueError(
                f"{at}: expected the fields {', '.join(fields)}, as in the first row, came {came}; fill them in, "
                "or name the fields that all rows have in columns="
            )
    return {name: _column([row[name] for row in rows], f"{path}/{name}" if path else name, where) for name in fields}


def _column(values: list[Any], path: str, where: _Where) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return _objects(values, path, where)
    expected = _kind(first)
    for number, value in enumerate(values):
        if expected is None or _kind(value) != expected:
            wanted = "true or false, a number, text or a list of them" if expected is None else _named(expected)
            raise ValueError(
                f"{where(number)}: {path}: expected {wanted}{', as in the first row' if number else ''}, came "
                f"{json.dumps(value):.60}; mend the line, or name other fields in columns="
            )
    if expected is not None and expected[0] is str:
        return np.array(values, dtype=object)
    made = np.array(values)
    if made.dtype.kind not in "bif":  # unsigned, or objects
        raise ValueError(f"{where(0)}: {path}: expected whole numbers that int64 holds, came larger ones; quote them")
    return made


def _kind(value: Any) -> tuple[Any, ...] | None:
    """Give the type and shape of a value, or None for what is no column: null, an empty list, unlike elements."""
    if isinstance(value, list):
        inside = {_kind(element) for element in value}
        kind = inside.pop() if len(inside) == 1 else None
        return None if kind is None else (kind[0], len(value), *kind[1:])
    if isinstance(value, bool):
        return (bool,)
    return (float,) if isinstance(value, (int, float)) else (str,) if isinstance(value, str) else None


def _named(kind: tuple[Any, ...]) -> str:
    one = {bool: "true or false", float: "a number", str: "text"}[kind[0]]
    return one if len(kind) == 1 else f"lists of shape {kind[1:]} of {one}"
