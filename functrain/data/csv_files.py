"""CSV files as dicts of columns: read by Arrow, and a fault found again by line, for the one who must mend it."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from functrain.data.tables import Table, arrow, check_names, existing, table_columns


def read_csv(
    path: str | Path,
    *,
    columns: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    text: Sequence[str] = (),
    missing: float | None = None,
    delimiter: str = ",",
) -> Table:
    r"""Read a CSV file into a dict of columns, arrays of N rows, or only those columns that are named.

    Integers are int64, other numbers float64, `true` and `false` bool, dates datetime64, and all else is text, an array
    of `str` objects; a column of `text` is text whatever stands in it. The first line has the names, unless `names`
    gives them. An empty cell, NA or NaN among numbers is an error, or `missing`, if that is given: such a column is
    float64. A file may be packed, as `.csv.gz`. Needs
    `pip install 'functrain[tables]'`.

    Raises: ValueError naming the file, the line and the column of a row of another length, of a value that is missing,
    and of a word in a column that began with a number.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     _ = Path(folder, "flowers.csv").write_text("petal,species\n1.4,setosa\n4.7,versicolor\n")
    ...     table = ft.data.read_csv(f"{folder}/flowers.csv")
    >>> table["petal"], table["species"].tolist()
    (array([1.4, 4.7]), ['setosa', 'versicolor'])
    """
    reader = arrow("csv", "read_csv")
    path = existing(path, "read_csv")
    header = list(names) if names is not None else next(_lines(path, delimiter), (1, []))[1]
    for wanted in (columns, text):
        check_names(header, wanted, str(path))
    types = {name: arrow("lib", "read_csv").string() for name in text}
    try:
        table = reader.read_csv(
            path,
            reader.ReadOptions(column_names=None if names is None else header),
            reader.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            reader.ConvertOptions(column_types=types, strings_can_be_null=False, include_columns=list(columns or ())),
        )
    except arrow("lib", "read_csv").ArrowInvalid as error:
        _raise_ragged(path, delimiter, header, names is not None)
        raise ValueError(f"{path}: expected a CSV file, came one that Arrow does not read ({error})") from None
    if not table.num_rows:
        raise ValueError(f"{path}: expected rows below the names, came none")
    for name in table.column_names:
        fault = _fault(table.column(name), name in text, missing)
        if fault is not None:
            row, expected, way_out = fault
            line, cell = _cell(path, delimiter, row + (names is None), header.index(name))
            raise ValueError(f"{path}, line {line}: column {name!r}: expected {expected}, came {cell!r}; {way_out}")
        if missing is not None and table.column(name).null_count:
            filled = table.column(name).cast("float64").fill_null(float(missing))
            table = table.set_column(table.column_names.index(name), name, filled)
    return table_columns(table, str(path))


def _fault(column: Any, is_text: bool, missing: float | None) -> tuple[int, str, str] | None:
    """Tell the row of a value that its column did not let expect, what was expected, and a way out."""
    types = arrow("types", "read_csv")
    number = any(is_kind(column.type) for is_kind in (types.is_integer, types.is_floating, types.is_null))
    if column.null_count and (missing is None or not number):
        expected = "a number" if number else f"{column.type}"
        way_out = "mend or leave out the row, or write missing=value" if number else "mend or leave out the row"
        return int(column.is_null().to_numpy().argmax()), expected, f"{way_out}, or name other columns in columns="
    if types.is_binary(column.type):
        odd = (row for row, value in enumerate(column.to_pylist()) if "\ufffd" in value.decode("utf-8", "replace"))
        return next(odd), "text in UTF-8", "convert the file"
    if types.is_string(column.type) and not is_text and _is_number(column[0].as_py()):
        for row, value in enumerate(column.to_pylist()):
            if not _is_number(value):
                return row, "a number, as in the rows before", "mend the row, or read it as text by text=[name]"
    return None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _raise_ragged(path: Path, delimiter: str, header: Sequence[str], named: bool) -> None:
    for line, row in _lines(path, delimiter):
        if len(row) != len(header):
            like = "the names given" if named else "the first line"
            raise ValueError(
                f"{path}, line {line}: expected {len(header)} cells, as in {like}, came {len(row)}: {row!r:.80}; "
                "mend the row, or give another delimiter="
            ) from None


def _cell(path: Path, delimiter: str, number: int, column: int) -> tuple[int, str]:
    for at, (line, row) in enumerate(_lines(path, delimiter)):
        if at == number:
            return line, row[column]
    raise AssertionError("a row that was read is in the file")


def _lines(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Give the rows that are not empty, each with the number, from 1, of the line that it ends in."""
    stream = arrow("lib", "read_csv").input_stream(path)  # unpacks .gz and the like, as it does for the columns
    with TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter)
        yield from ((rows.line_num, row) for row in rows if row)
