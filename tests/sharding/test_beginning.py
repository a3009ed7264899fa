"""Each start of all ranks has keys of its own in a store that lasts, whatever stands in it of starts before."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from torch import distributed

from functrain.sharding.beginning import name_of_start


def started(store: distributed.Store, ranks: list[int], world: int) -> dict[int, str]:
    """Let ranks begin together; return the name that each has."""
    found: dict[int, str] = {}

    def begin(rank: int) -> None:
        own = distributed.TCPStore("127.0.0.1", store.port, timeout=timedelta(seconds=20))  # type: ignore[attr-defined]
        found[rank] = name_of_start(own, rank, world)

    threads = [threading.Thread(target=begin, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_ranks_that_begin_again_have_another_name_in_common() -> None:
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    names = []
    for _ in range(3):
        found = started(store, [0, 1, 2, 3], 4)
        assert set(found) == {0, 1, 2, 3} and len(set(found.values())) == 1
        names.append(found[0])
    assert len(set(names)) == 3


def test_a_rank_that_does_not_come_is_named() -> None:
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set_timeout(timedelta(seconds=0.5))
    with pytest.raises(TimeoutError, match=r"expected 3 ranks to begin, ranks \[1, 2\] did not come"):
        name_of_start(store, 0, 3)


def test_ranks_that_died_before_the_first_one_came_are_no_ranks_of_the_next_start() -> None:
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for rank in (1, 2):  # they said that they came, and were killed
        store.set(f"functrain/came/{rank}", f"of the dead {rank}")
    found = started(store, [2, 1, 0], 3)
    assert len(set(found.values())) == 1
    # fewer ranks, as after a machine was lost
    fewer = started(store, [1, 0], 2)
    assert len(set(fewer.values())) == 1 and fewer[0] != found[0]
