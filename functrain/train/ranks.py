"""The processes of torch.distributed, where they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from torch import distributed

from functrain.sharding import Plan
from functrain.sharding.pieces import local
from functrain.sharding.plan import Spread
from functrain.train.loop_checks import is_indexed
from functrain.tree import Params


def gathered(value: Any) -> list[Any]:
    """Return the value of every rank, in their order, in each of them; where no group of several runs, of this one."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return [value]
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return found


class Bound(NamedTuple):
    """How a plan makes of params what a loss is called with; without one, they are this."""

    plan: Plan | None
    spread: Spread | None

    @classmethod
    def of(cls, params: Params, plan: Plan | None) -> Bound:
        return cls(plan, None if plan is None else plan.spread(params))

    def __call__(self, params: Params) -> Params:
        return params if self.plan is None else self.plan.bind(local(params), self.spread)

    def entered(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.plan is None else self.plan.entered()


def dealt(batches: Any, plan: Plan | None, *, together: bool) -> tuple[Any, int | None]:
    """Return this rank's batches of those that all have, every n-th one, and which of them, from 1, does not count.

    With `together`, all ranks get as many, so that they meet in what gathers params: where the last round has too few,
    a rank has that of another one once more.
    """
    if plan is None or plan.ranks == 1:
        return batches, None
    if not is_indexed(batches):
        batches = list(batches)
    count, rank, ranks = len(batches), plan.rank, plan.ranks
    numbers = list(range(rank, count, ranks))
    if together and count % ranks and rank >= count % ranks:
        return _Some(batches, [*numbers, count - 1]), len(numbers) + 1
    return _Some(batches, numbers), None


class _Some:
    """Batches by their numbers."""

    def __init__(self, batches: Any, numbers: list[int]) -> None:
        self._batches, self._numbers = batches, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: int) -> Any:
        return self._batches[self._numbers[i]]

    def __iter__(self) -> Iterator[Any]:
        return (self._batches[number] for number in self._numbers)
