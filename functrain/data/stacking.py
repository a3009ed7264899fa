"""Rows made into columns, and what may stand in a column: leaves of N rows that torch has a dtype for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from functrain.tree import Tree, children
from functrain.tree.nodes import rebuild, signature

_NUMBERS = (bool, int, float, complex)


def columns(node: Tree, path: str = "") -> Tree:
    """Give a tree of columns, each an array (N, ...), or a tensor where numpy has no such, all without a copy.

    Raises: ValueError or TypeError naming the path of what is no column.
    """
    if isinstance(node, Tensor):
        return _checked_tensor(node, path)
    if isinstance(node, np.ndarray):
        return checked_array(node, path)
    if isinstance(node, list):
        return _listed(node, path)
    inside = children(node)
    if inside is None:
        raise TypeError(f"{_at(path)}: expected an array or a tensor (N, ...), came {_described(node)}")
    return rebuild(node, [columns(child, f"{path}/{name}" if path else name) for name, child in inside])


def stacked(rows: Sequence[Tree], path: str = "") -> Tree:
    """Stack rows of one structure into a tree of tensors (B, ...) in new memory.

    Arrays keep their dtype; Python's numbers become what `torch.tensor` makes of them, as does a list of them.
    Raises: ValueError or TypeError naming the path of what differs from row to row, or is no number.
    """
    first = rows[0]
    if isinstance(first, (Tensor, np.ndarray, np.generic)):
        return _stacked_arrays(rows, path)
    if isinstance(first, _NUMBERS) or _is_list_of_numbers(first):
        return _tensor(list(rows), path)
    inside = children(first)
    if not inside:
        raise TypeError(
            f"{_at(path)}: expected rows of tensors, arrays and numbers, came {_described(first)}; "
            f"{_way_out(first)}, or batch by a torch DataLoader with a collate_fn, and give that to ft.data.loader"
        )
    alike = _alike(first)
    for number, row in enumerate(rows):
        if not alike(row):
            raise ValueError(
                f"{_at(path)}: expected every row to be like the first, {_described(first)}, came {_described(row)} "
                f"at number {number}; give all rows the same fields"
            )
    if type(first) is dict:
        return {key: stacked([row[key] for row in rows], f"{path}/{key}" if path else f"{key}") for key in first}
    below = zip(
        *(row if isinstance(row, (tuple, list)) else [x for _, x in children(row) or ()] for row in rows), strict=True
    )
    made = [
        stacked(column, f"{path}/{name}" if path else name) for (name, _), column in zip(inside, below, strict=True)
    ]
    return rebuild(first, made)


def checked_array(array: NDArray[Any], path: str) -> NDArray[Any]:
    """Return an array of a dtype that torch has, with a dimension of rows.

    Raises: ValueError or TypeError naming the path.
    """
    try:
        torch.from_numpy(np.empty(0, array.dtype))
    except (TypeError, ValueError):
        example = array.reshape(-1)[0] if array.size and array.dtype.kind == "O" else array.dtype.type
        raise TypeError(
            f"{_at(path)}: expected numbers of a dtype that torch has, came an array of {array.dtype}; "
            f"{_way_out(example)}"
        ) from None
    if array.ndim == 0:
        raise ValueError(f"{_at(path)}: expected an array (N, ...) with N rows, came one number, {array}")
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{_at(path)}: expected a value in every row, came a masked array; write array.filled(value)")
    return np.asarray(array)  # the plain array over a map: indexing the memmap class costs microseconds more


def _checked_tensor(tensor: Tensor, path: str) -> Tensor | NDArray[Any]:
    if tensor.ndim == 0:
        raise ValueError(f"{_at(path)}: expected a tensor (N, ...) with N rows, came one number, {tensor}")
    if tensor.requires_grad:
        raise ValueError(f"{_at(path)}: expected data, came a tensor that requires grad; write .detach()")
    try:
        return tensor.numpy()  # no copy: numpy gathers small rows in a third of the time
    except (TypeError, RuntimeError):  # bfloat16, on a GPU, a conjugate
        return tensor


def _listed(node: list[Any], path: str) -> Tree:
    if node and not isinstance(node[0], _NUMBERS) and not _is_list_of_numbers(node[0]):
        way_out = "write torch.stack(list)" if isinstance(node[0], Tensor) else _way_out(node[0])
        raise TypeError(
            f"{_at(path)}: expected a column, an array (N, ...) or a list of numbers, came a list of "
            f"{_described(node[0])}; {way_out}, or a tuple for several columns"
        )
    return _checked_tensor(_tensor(node, path), path)


def _tensor(values: list[Any], path: str) -> Tensor:
    try:
        return torch.tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{_at(path)}: expected a number, or as many numbers, in every row, came rows that torch.tensor does not "
            f"take ({error}); pad or crop them to one length"
        ) from None


def _stacked_arrays(rows: Sequence[Any], path: str) -> Tensor:
    first = rows[0]
    kind, dtype = type(first), first.dtype
    try:
        # that all have one shape is looked at by stack; it would promote dtypes
        if all(type(row) is kind and row.dtype == dtype for row in rows):
            if isinstance(first, Tensor):
                return torch.stack(tuple(rows)).detach()
            return torch.from_numpy(checked_array(np.stack(rows), path))
    except (RuntimeError, ValueError):
        if all(row.shape == first.shape for row in rows):
            raise
    number = [type(row) is kind and row.shape == first.shape and row.dtype == dtype for row in rows].index(False)
    raise ValueError(
        f"{_at(path)}: expected every row to be like the first, {_described(first)}, came {_described(rows[number])} "
        f"at number {number}; pad or crop them to one shape"
    ) from None


def _alike(first: Tree) -> Callable[[Tree], bool]:
    """Tell whether another row is the same node: by what is quick for the kinds that most rows are."""
    kind = type(first)
    if kind is dict:
        fields = first.keys()
        return lambda row: type(row) is dict and row.keys() == fields
    if isinstance(first, (tuple, list)):
        size = len(first)
        return lambda row: type(row) is kind and len(row) == size
    expected = signature(first)
    return lambda row: signature(row) == expected


def _is_list_of_numbers(node: Any) -> bool:
    while isinstance(node, list) and node:
        node = node[0]
    return isinstance(node, _NUMBERS)


def _described(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return f"{type(value).__name__} {tuple(value.shape)} of {value.dtype}"
    if isinstance(value, dict):
        return f"a dict of {', '.join(map(repr, value))}"
    return f"{type(value).__name__} {value!r:.60}"


def _way_out(value: Any) -> str:
    kind = value if isinstance(value, type) else type(value)
    if issubclass(kind, (str, np.str_, np.bytes_, bytes)):
        return "leave the column out, or number its words by ft.data.categories(column)"
    if issubclass(kind, np.datetime64):
        return "leave the column out, or write column.astype('int64')"
    if issubclass(kind, np.generic):
        return "write .astype() with a dtype that torch has"
    return "leave it out, or make numbers of it"


def _at(path: str) -> str:
    return f"batches: {path}" if path else "batches"
