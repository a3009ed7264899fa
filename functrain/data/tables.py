"""Tables of Arrow as dicts of columns, and Parquet files, which Arrow reads."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Table: TypeAlias = dict[str, Any]  # of arrays (N, ...): numbers, bool, datetime64, objects that are text; dicts of such


def read_parquet(path: str | Path, *, columns: Sequence[str] | None = None) -> Table:
    """Read a Parquet file into a dict of columns, arrays of N rows, or only those that are named.

    Numbers keep their dtype, text is an array of `str` objects, lists of one length are an array (N, length), and a
    struct is a dict of its columns. Needs `pip install 'functrain[tables]'`.

    Raises: ValueError naming the file, the column and the row of what is missing, or is a list of another length.

    >>> import pyarrow.parquet
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     pyarrow.parquet.write_table(pyarrow.table({"x": [0.5, 1.5], "name": ["a", "b"]}), f"{folder}/rows.parquet")
    ...     ft.data.read_parquet(f"{folder}/rows.parquet", columns=["x"])
    {'x': array([0.5, 1.5])}
    """
    parquet = arrow("parquet", "read_parquet")
    path = existing(path, "read_parquet")
    try:
        names = parquet.read_schema(path).names
        check_names(names, columns, str(path))
        table = parquet.read_table(path, columns=None if columns is None else list(columns))
    except arrow("lib", "read_parquet").ArrowException as error:
        raise ValueError(f"{path}: expected a Parquet file, came something else ({error})") from None
    return table_columns(table, str(path))


def table_columns(table: Any, where: str) -> Table:
    """Give the columns of a pyarrow Table.

    Raises: ValueError naming the column and the row, from 0, of a value that is missing.
    """
    return {name: _column(table.column(name), f"{where}: column {name!r}") for name in table.column_names}


def arrow(module: str, asks: str) -> Any:
    """Import a module of pyarrow, which is optional."""
    try:
        return import_module(f"pyarrow.{module}")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{asks} needs the package 'pyarrow'; install it with: pip install 'functrain[tables]'", name="pyarrow"
        ) from None


def existing(path: str | Path, asks: str) -> Path:
    """Return the path of a file that is there and not empty."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{asks}: expected a file, found none at {path}; check the path")
    if not path.stat().st_size:
        raise ValueError(f"{path}: expected rows, came an empty file")
    return path


def check_names(names: Sequence[str], wanted: Sequence[str] | None, where: str) -> None:
    """Raise a ValueError for a name that two columns have, or that none has."""
    if twice := sorted({name for name in names if list(names).count(name) > 1}):
        raise ValueError(f"{where}: expected a name for each column, came {twice[0]!r} twice; rename one")
    if unknown := [name for name in wanted or () if name not in names]:
        raise ValueError(f"{where}: expected columns among {', '.join(names)}, came {unknown[0]!r}")


def _column(column: Any, where: str) -> Any:
    types = arrow("types", "read_parquet")
    if column.null_count:
        row = column.is_null().to_numpy().argmax()
        raise ValueError(
            f"{where}: expected {column.type} in every row, row {row} has none; fill or leave out the "
            f"{column.null_count} rows without one, or name the other columns in columns="
        )
    kind = column.type
    if types.is_dictionary(kind):
        return _column(column.cast(kind.value_type), where)
    if types.is_struct(kind):
        whole = column.combine_chunks()
        fields = [kind.field(number).name for number in range(kind.num_fields)]
        return {name: _column(_chunked(part), where) for name, part in zip(fields, whole.flatten(), strict=True)}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _lists(column.combine_chunks(), where)
    return np.array(column.to_numpy())  # its own memory: that of Arrow is not to be written to


def _lists(column: Any, where: str) -> NDArray[Any]:
    lengths = arrow("compute", "read_parquet").list_value_length(column).to_numpy(zero_copy_only=False)
    if len(lengths) and (odd := np.flatnonzero(lengths != lengths[0])).size:
        raise ValueError(
            f"{where}: expected lists of one length, {lengths[0]} as in row 0, came {lengths[odd[0]]} in row {odd[0]}; "
            "pad them, or name the other columns in columns="
        )
    inside = _column(_chunked(column.flatten()), where)
    if isinstance(inside, dict):
        raise ValueError(f"{where}: expected lists of numbers or of text, came lists of structs; leave the column out")
    return inside.reshape(len(column), int(lengths[0]) if len(lengths) else 0, *inside.shape[1:])


def _chunked(array: Any) -> Any:
    return array if hasattr(array, "combine_chunks") else arrow("lib", "read_parquet").chunked_array([array])
