"""One rank's rows of batches that all ranks have in common."""

from __future__ import annotations

from operator import index
from typing import Any

from functrain import tree
from functrain.data.background import Indexable
from functrain.sharding import Plan
from functrain.tree.rows import edges


class Shard:
    """The rows of each batch that are one rank's; see `shard`."""

    def __init__(self, batches: Indexable[Any], rank: int, world: int, parts: int = 1) -> None:
        self.batches, self.rank, self.world, self.parts = batches, rank, world, parts

    def __getitem__(self, t: int) -> Any:
        batch = self.batches[t]
        rows = {path: len(leaf) for path, leaf in tree.items(batch)}
        if len(set(rows.values())) != 1 or min(rows.values()) < self.world * self.parts:
            each = "one for each" if self.parts == 1 else f"{self.parts} for each"
            raise ValueError(
                f"shard: batch {t}: expected as many rows in every leaf, and {each} of {self.world} ranks, came "
                f"{rows}; give larger batches, or fewer ranks"
            )
        cuts = edges(next(iter(rows.values())), self.world * self.parts)
        first, stop = (cuts[r * self.parts] for r in (self.rank, self.rank + 1))
        return tree.map(lambda leaf: leaf[first:stop], batch)


class FiniteShard(Shard):
    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]


def shard(
    batches: Indexable[Any],
    *,
    plan: Plan | None = None,
    rank: int | None = None,
    world: int | None = None,
    accumulate: int = 1,
) -> Shard:
    """Give one rank its rows of each batch: those of all ranks, one after another, are the batch.

    The rank is that of a `plan`, or `rank` of `world`. So a run has one order of samples at every world size, and goes
    on in it at another one. Ranks differ by at most a row, of `accumulate` slices by at most a row a slice; the sums of
    a `Loss`, added over ranks, weigh each row alike. Given the number of slices that a step accumulates, n ranks of k
    slices cut a batch as one process of n * k does.

    Shapes: batch t (B, ...) becomes (B // world, ...); the first ranks have the rows that are left over.
    Raises: ValueError for a rank that is not of the world, or no rank, or two; at a batch, for fewer rows than ranks.

    >>> batches = ft.data.batches({"x": torch.arange(8)}, batch=4, shuffle=False)
    >>> [ft.data.shard(batches, rank=rank, world=2)[0]["x"].tolist() for rank in (0, 1)]
    [[0, 1], [2, 3]]
    """
    if plan is not None and rank is None and world is None:
        rank, world = plan.rank, plan.ranks
    if plan is not None and (rank, world) != (plan.rank, plan.ranks) or rank is None or world is None:
        raise ValueError(f"shard: expected a plan, or a rank and a world, came plan={plan}, rank={rank}, world={world}")
    if not 0 <= index(rank) < index(world):
        raise ValueError(f"shard: expected a rank in [0, {world}), came {rank}")
    if type(accumulate) is not int or accumulate < 1:
        raise ValueError(f"shard: expected accumulate of at least 1 slice, came {accumulate!r}")
    return (FiniteShard if hasattr(batches, "__len__") else Shard)(batches, rank, world, accumulate)
