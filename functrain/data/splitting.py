"""Rows that are held out for validation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from functrain.data.order import Indices, permuted
from functrain.tree import children
from functrain.tree.nodes import rebuild


def split(source: Any, *, validation: float = 0.1, seed: int) -> tuple[Any, Any]:
    """Split the rows of a source at random, (train, validation), each side in the order in which its rows lay.

    A source is one of `batches`, and may have columns of text. Of a tree, a list and a table the two are copies of the
    rows; of a Dataset they are each a `torch.utils.data.Subset`, or of Hugging Face's what `select` gives.

    Raises: ValueError if a side has no row, and naming the lengths of columns that differ.

    >>> train, validation = ft.data.split({"x": torch.arange(10)}, validation=0.2, seed=0)
    >>> len(train["x"]), len(validation["x"])
    (8, 2)
    """
    lengths = _lengths(source, "")
    if len(set(lengths.values())) != 1:
        raise ValueError(f"split: expected the same number of rows in every column, came {lengths}")
    rows = next(iter(lengths.values()))
    held_out = round(validation * rows) if 0.0 <= validation <= 1.0 else 0
    if not 0 < held_out < rows:
        raise ValueError(
            f"split: expected a fraction for validation that leaves rows on both sides, came {validation} of {rows} "
            "rows; 0.1 is usual"
        )
    if not 0 <= seed < 2**64:
        raise ValueError(f"split: expected a seed in [0, 2**64), came {seed}")
    order = permuted(np.arange(rows), rows, seed, 0)
    return _taken(source, np.sort(order[held_out:])), _taken(source, np.sort(order[:held_out]))


def _lengths(source: Any, path: str) -> dict[str, int]:
    inside = None if isinstance(source, list) else children(source)
    if inside is None:
        if not hasattr(source, "__len__") or isinstance(source, (str, bytes)) or not _ndim(source):
            at = f"split: {path}" if path else "split"
            raise TypeError(
                f"{at}: expected rows that can be asked for by number, in a tree of arrays, a list, a table or "
                f"a dataset with a length, came {type(source).__name__}"
            )
        return {path: len(source)}
    return {at: n for name, child in inside for at, n in _lengths(child, f"{path}/{name}" if path else name).items()}


def _taken(source: Any, rows: Indices) -> Any:
    if isinstance(source, list):
        return [source[row] for row in rows.tolist()]
    if isinstance(source, Tensor):
        return source[torch.from_numpy(rows).to(source.device)]
    if isinstance(source, np.ndarray):
        return np.asarray(source)[rows]
    inside = children(source)
    if inside is not None:
        return rebuild(source, [_taken(child, rows) for _, child in inside])
    for package, method in (("datasets", "select"), ("pandas", "take"), ("pyarrow", "take")):
        if type(source).__module__.partition(".")[0] == package:
            return getattr(source, method)(rows)
    return Subset(source, rows.tolist())


def _ndim(source: Any) -> int:
    return getattr(source, "ndim", 1)
