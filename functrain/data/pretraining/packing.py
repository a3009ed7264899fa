"""Which pieces of documents lie together in a row: best fit decreasing. N pieces, R rows."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict

import numpy as np

from functrain.data.order import Indices


def best_fit(lengths: Indices, room: int) -> Indices:
    """Give the row of each piece, (N,), by best fit decreasing: the longest first, each where the least room is left.

    Rows of equal room are filled at once, so that the time is that of a sort and of at most some `room` steps more.
    Lengths are 1 to `room`; rows are numbered from 0. Pieces of one length take their places in the order given.

    Source: Ding et al. 2024 (arXiv:2404.10830), section 3.
    """
    row_of = np.empty(len(lengths), np.int64)
    if not len(lengths):
        return row_of
    open_rows: dict[int, list[Indices]] = defaultdict(list)  # by the room that is left
    rooms: list[int] = []  # keys of `open_rows`, ascending
    rows = 0

    def leave(ids: Indices, left: int) -> None:
        if left and len(ids):
            if left not in open_rows:
                insort(rooms, left)
            open_rows[left].append(ids)

    longest_first = np.argsort(-lengths, kind="stable")
    found, starts = np.unique(-lengths[longest_first], return_index=True)
    for length, pieces in zip((-found).tolist(), np.split(longest_first, starts[1:]), strict=True):
        while len(pieces):
            at = bisect_left(rooms, length)
            if at == len(rooms):
                left = room
                ids = np.arange(rows, rows - -len(pieces) // (room // length), dtype=np.int64)
                rows += len(ids)
            else:
                left = rooms.pop(at)
                ids = np.concatenate(open_rows.pop(left))
            each = left // length  # pieces in one of these rows: what is left then is the least room, and so on
            full, more = divmod(min(len(pieces), each * len(ids)), each)
            row_of[pieces[: full * each]] = np.repeat(ids[:full], each)
            leave(ids[:full], left - each * length)
            if more:
                row_of[pieces[full * each : full * each + more]] = ids[full]
                leave(ids[full : full + 1], left - more * length)
            leave(ids[full + bool(more) :], left)
            pieces = pieces[full * each + more :]
    return row_of
