"""One rank's rows of batches that all ranks have in common."""

from __future__ import annotations

from operator import index
from typing import Any

from functrain import tree
from functrain.data.background import Indexable


class Shard:
    """The rows of each batch that are one rank's; see `shard`."""

    def __init__(self, batches: Indexable[Any], rank: int, world: int) -> None:
        self.batches, self.rank, self.world = batches, rank, world

    def __getitem__(self, t: int) -> Any:
        batch = self.batches[t]
        rows = {path: len(leaf) for path, leaf in tree.items(batch)}
        if len(set(rows.values())) != 1 or min(rows.values()) < self.world:
            raise ValueError(
                f"shard: batch {t}: expected as many rows in every leaf, and one for each of {self.world} ranks, came "
                f"{rows}; give larger batches, or fewer ranks"
            )
        size = next(iter(rows.values()))
        first, stop = (r * size // self.world for r in (self.rank, self.rank + 1))
        return tree.map(lambda leaf: leaf[first:stop], batch)


class FiniteShard(Shard):
    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]


def shard(batches: Indexable[Any], *, rank: int, world: int) -> Shard:
    """Give one rank its rows of each batch: those of all ranks, one after another, are the batch.

    So a run has one order of samples at every world size, and goes on in it at another one. Ranks differ by at most a
    row; the sums of a `Loss`, added over ranks, weigh each row alike.

    Shapes: batch t (B, ...) becomes (B // world, ...), or one row more.
    Raises: ValueError for a rank that is not of the world; at a batch, for fewer rows than ranks.

    >>> batches = ft.data.batches({"x": torch.arange(8)}, batch=4, shuffle=False)
    >>> [ft.data.shard(batches, rank=rank, world=2)[0]["x"].tolist() for rank in (0, 1)]
    [[0, 1], [2, 3]]
    """
    if not 0 <= index(rank) < index(world):
        raise ValueError(f"shard: expected a rank in [0, {world}), came {rank}")
    return (FiniteShard if hasattr(batches, "__len__") else Shard)(batches, rank, world)
