"""How torch.distributed begins, also where torchrun has started all ranks again."""

from __future__ import annotations

import os
import time
import uuid
from typing import Any

from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

_POLL = 0.01  # seconds


def begin(backend: str) -> None:
    """Begin torch.distributed from what torchrun tells.

    torchrun that starts ranks again, after one was killed, gives them the store of before, in which the addresses of
    dead ones stand, and no number of the start that all machines agree on (pytorch #135712). So each start has keys of
    its own, under a name that rank 0 makes and tells those that it has met.
    """
    store, rank, world = next(rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = PrefixStore(name_of_start(store, rank, world), store)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world)


def name_of_start(store: Any, rank: int, world: int) -> str:
    """Return a name that the ranks that call this together have in common, and those of no other time.

    A rank says that it came by a word of its own, and waits for an answer to it; rank 0 answers every word, old ones
    too, until each rank has said that it has the name.

    Raises: TimeoutError on rank 0, which names the ranks that did not come in the store's time; on others as the store.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"functrain/came/{rank}", own)
        name: str = store.get(f"functrain/answer/{own}").decode()
        store.set(f"functrain/there/{name}/{rank}", "")
        return name
    missing, answered = set(range(1, world)), dict[int, bytes]()
    end = time.monotonic() + store.timeout.total_seconds()
    while missing:
        if time.monotonic() > end:
            raise TimeoutError(
                f"sharding: expected {world} ranks to begin, ranks {sorted(missing)} did not come in {store.timeout}; "
                "look at what they say"
            )
        for other in sorted(missing):
            if store.check([f"functrain/there/{own}/{other}"]):
                missing.remove(other)
            elif store.check([f"functrain/came/{other}"]):
                word = store.get(f"functrain/came/{other}")
                if answered.get(other) != word:
                    store.set(f"functrain/answer/{word.decode()}", own)
                    answered[other] = word
        time.sleep(_POLL)
    return own
