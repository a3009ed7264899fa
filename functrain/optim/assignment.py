"""The cheapest pairs of rows and columns."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from functrain.tree import elsewhere

__all__ = ["base_hungarian_algorithm", "hungarian_algorithm"]


def hungarian_algorithm(cost_matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return (rows, columns) of min(n, m) pairs, no row or column twice, whose costs have the smallest sum.

    Shortest augmenting paths on the host, in float64: it reads the costs, so it is no part of a compiled step, and
    O(n**2 m). Equals `optax.assignment.hungarian_algorithm` in the sum; which of several cheapest assignments it is may
    differ. Rows are ascending.

    Source: Crouse 2016, On implementing 2D rectangular assignment algorithms.

    Shapes: cost_matrix (n, m); both results (min(n, m),), int64.
    Raises: ValueError for a tensor that is no matrix, or holds NaN; when no assignment has a finite sum.

    >>> costs = torch.tensor([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0], [3.0, 2.0, 2.0]])
    >>> rows, columns = ft.optim.assignment.hungarian_algorithm(costs)
    >>> columns, costs[rows, columns].sum()
    (tensor([1, 0, 2]), tensor(5.))
    """
    if cost_matrix.ndim != 2:
        raise ValueError(f"hungarian_algorithm: expected costs (n, m), came {tuple(cost_matrix.shape)}")
    costs = cost_matrix.detach().to("cpu", torch.float64).numpy()
    if np.isnan(costs).any():
        raise ValueError("hungarian_algorithm: expected costs, came NaN; give a pair that may not be inf")
    turned = costs.shape[0] > costs.shape[1]
    of_column = _columns(costs.T if turned else costs)
    pairs = torch.from_numpy(np.stack([np.arange(len(of_column)), of_column]))  # (2, min(n, m))
    if turned:
        pairs = pairs[:, torch.argsort(pairs[1])].flip(0)
    rows, columns = pairs.to(cost_matrix.device)
    return rows, columns


base_hungarian_algorithm = hungarian_algorithm  # optax has two programs for one result


def _columns(costs: np.ndarray) -> np.ndarray:
    """Return the column of each row, for no more rows than columns."""
    n, m = costs.shape
    u, v = np.zeros(n), np.zeros(m)  # prices that make every reduced cost non-negative
    row_of = np.full(m, -1)
    column_of = np.full(n, -1)
    for start in range(n):
        shortest, before = np.full(m, np.inf), np.full(m, -1)
        seen_rows, seen = np.zeros(n, bool), np.zeros(m, bool)
        row, length = start, 0.0
        while True:
            seen_rows[row] = True
            reduced = length + costs[row] - u[row] - v
            better = ~seen & (reduced < shortest)
            shortest[better], before[better] = reduced[better], row
            # among equals a free column first: it ends the path
            open_lengths = np.where(seen, np.inf, shortest)
            length = open_lengths.min()
            if length == np.inf:
                raise ValueError("hungarian_algorithm: every assignment has an infinite cost; allow more pairs")
            ties = np.flatnonzero(open_lengths == length)
            free = ties[row_of[ties] == -1]
            column = int(free[0] if len(free) else ties[0])
            seen[column] = True
            if row_of[column] == -1:
                break
            row = row_of[column]
        u[start] += length
        others = seen_rows.copy()
        others[start] = False
        u[others] += length - shortest[column_of[others]]
        v[seen] -= length - shortest[seen]
        while True:
            row = before[column]
            row_of[column] = row
            column_of[row], column = column, column_of[row]
            if row == start:
                break
    return column_of


elsewhere.furnish(__name__)
