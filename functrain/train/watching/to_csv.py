"""A CSV file, for spreadsheets."""

from __future__ import annotations

import csv as format
import io
import os
from collections.abc import Sequence
from pathlib import Path

from functrain.data.atomic import replacing
from functrain.train.watching.rows import Row


def csv(file: str | os.PathLike[str]) -> Csv:
    """Return a logger that writes a CSV file: a column for each metric, empty where a step does not have it.

    A column that comes later, as a first validation's, is added to the rows before, for which the file is written anew.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as run:
    ...     logger = ft.train.watching.csv(f"{run}/metrics.csv")  # for ft.train.record(run, loggers=[logger])
    ...     logger.log([{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "validation_loss": 0.75}])
    ...     print(Path(run, "metrics.csv").read_text(), end="")
    step,loss,validation_loss
    1,0.5,
    2,0.25,0.75
    """
    return Csv(Path(file))


class Csv:
    """The logger that `csv` returns."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._columns: list[str] = []

    def begin(self, step: int) -> None:
        there = self._read()
        self._columns = list(there[0]) if there else []
        if there:
            self._write([row for row in there if float(row["step"]) <= step])

    def log(self, rows: Sequence[Row]) -> None:
        new = [{name: repr(value) for name, value in row.items()} for row in rows]
        names = {name: None for row in new for name in row if name not in self._columns}
        if names:
            there = self._read()
            self._columns += names
            self._write([*there, *new])
            return
        with open(self._file, "a", newline="", encoding="utf-8") as out:
            out.write(self._text(new))

    def close(self) -> None: ...

    def _read(self) -> list[dict[str, str]]:
        if not self._file.exists():
            return []
        text = self._file.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a kill may have cut the last line short
        return list(format.DictReader(io.StringIO(whole)))

    def _write(self, rows: Sequence[dict[str, str]]) -> None:
        with replacing(self._file) as out:
            out.write(self._text([{name: name for name in self._columns}, *rows]).encode())

    def _text(self, rows: Sequence[dict[str, str]]) -> str:
        out = io.StringIO()
        format.DictWriter(out, self._columns, restval="", lineterminator="\n").writerows(rows)
        return out.getvalue()
