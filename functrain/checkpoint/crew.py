"""The ranks that save and load together: one of them leads, and what fails in one is an error in all."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

from functrain.checkpoint.errors import StorageError
from functrain.sharding import Plan

T = TypeVar("T")


class Crew:
    """The ranks of a plan, each of which must call the same methods in the same order; without a plan, this process.

    With `own_group`, they talk in a group of their own, so that a thread may do so beside a step that runs.
    """

    def __init__(self, plan: Plan | None, *, own_group: bool = False) -> None:
        self.count: int = 1 if plan is None else plan.mesh.world
        self.rank: int = 0 if plan is None else plan.mesh.rank
        # by gloo, what is said needs no device
        self._group: Any = distributed.new_group(backend="gloo") if own_group and self.count > 1 else None

    @property
    def leads(self) -> bool:
        """Whether this is the rank that makes, renames and removes folders."""
        return self.rank == 0

    def led(self, where: str | os.PathLike[str], fn: Callable[[], T]) -> T:
        """Return on all ranks what `fn` returns on the first, which alone calls it. Raises: as `agreed`."""
        return self.agreed(where, fn if self.leads else lambda: None)[0]  # type: ignore[return-value]

    def in_turn(self, where: str | os.PathLike[str], fn: Callable[[], T]) -> T:
        """Return what `fn` returns here; the first rank calls it before the others do. Raises: as `agreed`."""
        found: list[T] = []

        def mine() -> None:
            found.append(fn())

        for turn in (True, False)[: self.count]:
            self.agreed(where, mine if self.leads == turn else lambda: None)
        return found[0]

    def each(self, where: str | os.PathLike[str], fn: Callable[[], T]) -> T:
        """Return what `fn` returns here, when it has returned on all ranks. Raises: as `agreed`."""
        found: list[T] = []
        self.agreed(where, lambda: found.append(fn()))
        return found[0]

    def agreed(self, where: str | os.PathLike[str], fn: Callable[[], T]) -> list[T]:
        """Return what `fn` returns on each rank.

        Raises: on a rank where it raises, that; on the others StorageError, which names the rank and says what it said.
        """
        if self.count == 1:
            return [fn()]
        own: Exception | None = None
        try:
            said: tuple[bool, Any] = True, fn()
        except Exception as error:
            own, said = error, (False, f"{type(error).__name__}: {error}")
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, said, group=self._group)
        if own is not None:
            raise own
        for rank, (good, value) in enumerate(found):
            if not good:
                raise StorageError(
                    where, expected="every rank to do its part", came=f"rank {rank}: {value}",
                    way_out="mend what that rank says; nothing else was changed",
                )  # fmt: skip
        return [value for _, value in found]


ALONE = Crew(None)
