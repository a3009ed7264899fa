"""Text or numbers that stand for classes, as labels from 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def categories(column: Any, *, names: Sequence[Any] | None = None) -> tuple[NDArray[np.int64], list[Any]]:
    """Number the values of a column, (labels, names): `names[labels[i]] == column[i]`, and the names are sorted.

    With the `names` of an earlier call, labels mean the same in another file, as of a test set.

    Shapes: a column (N,) gives labels (N,), int64.
    Raises: ValueError naming the row of a value that is none of `names`.

    >>> labels, names = ft.data.categories(["cat", "dog", "cat"])
    >>> labels.tolist(), names
    ([0, 1, 0], ['cat', 'dog'])
    """
    values = np.asarray(column.cpu() if isinstance(column, Tensor) else column)
    if values.ndim != 1:
        raise ValueError(f"categories: expected one column (N,), came shape {values.shape}; take one, as table['name']")
    if names is None:
        found, labels = np.unique(values, return_inverse=True)
        return labels.astype(np.int64), found.tolist()
    number = {name: label for label, name in enumerate(names)}
    if len(number) != len(names):
        raise ValueError(f"categories: expected names that differ, came {list(names)!r:.80}")
    for row, value in enumerate(listed := values.tolist()):
        if value not in number:
            raise ValueError(
                f"categories: row {row}: expected one of {len(names)} names, {', '.join(map(repr, names))}, came "
                f"{value!r}; leave the row out, or number both files together"
            )
    return np.array([number[value] for value in listed], np.int64), list(names)
