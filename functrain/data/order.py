"""Orders: which windows of tokens, or which rows, are in batch t, as pure functions of the seed and t."""

from __future__ import annotations

from functools import lru_cache
from math import isqrt
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Indices: TypeAlias = NDArray[np.int64]
Last: TypeAlias = Literal["continued", "short", "filled", "dropped"]


class Crops(NamedTuple):
    """Starts drawn uniformly and independently from every place where a window fits."""

    batch: int
    context: int
    seed: int
    tokens: int

    def starts(self, t: int) -> Indices:  # (batch,)
        # modulo: a start is likelier than another by less than tokens / 2**64
        return (raw_bits(self.seed, t, self.batch) % np.uint64(self.tokens - self.context)).astype(np.int64)


class Epochs(NamedTuple):
    """Windows side by side, each exactly once per epoch in shuffled order, from a phase drawn anew for each epoch."""

    batch: int
    context: int
    seed: int
    tokens: int

    @property
    def windows_per_epoch(self) -> int:
        return max(1, (self.tokens - self.context) // self.context)  # fits for every phase below `context`

    def starts(self, t: int) -> Indices:  # (batch,)
        count = self.windows_per_epoch
        slack = self.tokens - 1 - count * self.context  # the last window ends here at most, so every token is met
        first, stop = t * self.batch, (t + 1) * self.batch
        starts = []
        for epoch in range(first // count, (stop - 1) // count + 1):
            inside = np.arange(max(first, epoch * count), min(stop, (epoch + 1) * count), dtype=np.int64)
            phase = int(_phase_bits(self.seed, epoch)) % (slack + 1)
            starts.append(permuted(inside - epoch * count, count, self.seed, epoch) * self.context + phase)
        return np.concatenate(starts)


_KEPT = 2**17  # rows whose order is kept for an epoch, 1 MiB: to draw a small batch's part takes longer than its copy


class Rows(NamedTuple):
    """Rows, each exactly once per epoch, in an order drawn anew for each epoch or as they lie."""

    rows: int
    batch: int
    seed: int | None  # None: as they lie
    last: Last
    epochs: int | None  # None: without end

    def total(self) -> int | None:
        """Give the number of batches of all epochs."""
        if self.epochs is None:
            return None
        return -(-self.epochs * self.rows // self.batch) if self.last == "continued" else self.epochs * self._per_epoch

    @property
    def steps_per_epoch(self) -> float:
        """The number of batches of an epoch, a fraction where they go on into the next."""
        return self.rows / self.batch if self.last == "continued" else float(self._per_epoch)

    def indices(self, t: int) -> Indices:  # (batch,), or fewer at an end
        if self.last == "continued":
            first = t * self.batch
            stop = first + self.batch if self.epochs is None else min(first + self.batch, self.epochs * self.rows)
        else:
            epoch, number = divmod(t, self._per_epoch)
            first = epoch * self.rows + number * self.batch
            stop = min(first + self.batch, (epoch + 1) * self.rows)
        found = []
        for epoch in range(first // self.rows, (stop - 1) // self.rows + 1):
            start = epoch * self.rows
            begin, end = max(first - start, 0), min(stop - start, self.rows)
            if self.seed is not None and self.rows <= _KEPT:
                found.append(_order(self.rows, self.seed, epoch)[begin:end].copy())
                continue
            inside = np.arange(begin, end, dtype=np.int64)
            found.append(inside if self.seed is None else permuted(inside, self.rows, self.seed, epoch))
        return found[0] if len(found) == 1 else np.concatenate(found)

    @property
    def _per_epoch(self) -> int:
        return self.rows // self.batch if self.last == "dropped" else -(-self.rows // self.batch)


def permuted(indices: Indices, count: int, seed: int, epoch: int) -> Indices:
    """Send each index to its place under a permutation of range(count) drawn from (seed, epoch).

    Holds about 6 sqrt(count) numbers, never count. An index is a cell of a nearly square rectangle; each round moves it
    along its row by an amount drawn for the row, then along its column by one drawn for the column. The few that land
    on a cell past `count` go round again, which keeps the map a permutation.
    Source: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", generalized Feistel with cycle walking.
    """
    moves = _moves(seed, epoch, count)
    placed = _rounds(indices, moves)
    while (outside := placed >= count).any():
        placed[outside] = _rounds(placed[outside], moves)
    return placed


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> Indices:
    return permuted(np.arange(count, dtype=np.int64), count, seed, epoch)


_Moves: TypeAlias = tuple[tuple[Indices, Indices], ...]  # per round: (height,) below width, (width,) below height


def _rounds(indices: Indices, moves: _Moves) -> Indices:
    height, width = len(moves[0][0]), len(moves[0][1])
    row, column = np.divmod(indices, width)
    for along_row, along_column in moves:
        column = (column + along_row[row]) % width
        row = (row + along_column[column]) % height
    return row * width + column


@lru_cache(maxsize=8)
def _moves(seed: int, epoch: int, count: int) -> _Moves:
    width = isqrt(count - 1) + 1
    height = -(-count // width)
    rounds = 3  # six Feistel rounds; four already pass as random
    bits = raw_bits(seed, epoch, 1 + rounds * (width + height))[1:].reshape(rounds, width + height)
    moves = []
    for draw in bits:
        along_row, along_column = draw[:height] % np.uint64(width), draw[height:] % np.uint64(height)
        moves.append((along_row.astype(np.int64), along_column.astype(np.int64)))
    return tuple(moves)


@lru_cache(maxsize=8)
def _phase_bits(seed: int, epoch: int) -> Any:
    return raw_bits(seed, epoch, 1)[0]


def raw_bits(seed: int, counter: int, size: int) -> NDArray[np.uint64]:
    """Draw raw Philox4x64 output under the key (seed, counter): fixed by its paper, in every version of numpy."""
    return np.random.Philox(key=seed | counter << 64).random_raw(size)


def stream(seed: int, counter: int, start: int, size: int) -> NDArray[np.uint64]:
    """Draw blocks `start` to `start + size - 1` of the output of `raw_bits(seed, counter, ...)`, (size, 4)."""
    philox = np.random.Philox(key=seed | counter << 64)
    return philox.advance(start).random_raw(4 * size).reshape(size, 4)
