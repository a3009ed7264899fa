"""How the rows of a batch are cut: alike for slices that are added and for ranks."""

from __future__ import annotations


def edges(rows: int, parts: int) -> list[int]:
    """Return where each of the parts begins, and where the last ends; the first `rows % parts` have a row more.

    >>> edges(5, 2)
    [0, 3, 5]
    """
    return [i * (rows // parts) + min(i, rows % parts) for i in range(parts + 1)]
