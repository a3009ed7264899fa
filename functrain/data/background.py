"""Batches made ahead of time by background threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch

from functrain.data.to_device import Copies, Underway

T = TypeVar("T", covariant=True)
U = TypeVar("U")


class Indexable(Protocol[T]):
    def __getitem__(self, t: int, /) -> T: ...


def prefetch(
    batches: Indexable[U],
    start: int,
    stop: int,
    *,
    depth: int = 2,
    workers: int = 1,
    device: torch.device | str | None = None,
) -> Iterator[U]:
    """Iterate over `batches[start] ... batches[stop - 1]`, made up to `depth` ahead by threads.

    Equals `(batches[t] for t in range(start, stop))` for any depth and any number of workers; with a device, those
    batches moved there. To CUDA the threads pin and copy them, by a stream beside the one that computes: the copy of
    the next batch overlaps the step, up to `depth` batches wait on the device, and the stream that is current where a
    batch is taken waits for that batch alone. An error in batch t is raised when its turn comes, with the traceback of
    the thread. The threads start with the first batch asked for and end with the last, or when the iterator is closed
    or dropped.

    >>> batches = ft.data.batches({"x": torch.arange(8)}, batch=2, shuffle=False)
    >>> [batch["x"].tolist() for batch in ft.data.prefetch(batches, 1, 3)]
    [[2, 3], [4, 5]]
    """
    if depth < 1 or workers < 1:
        raise ValueError(f"prefetch: expected depth and workers of 1 or more, came depth={depth}, workers={workers}")
    return _prefetch(batches, start, stop, depth, workers, None if device is None else torch.device(device))


def _prefetch(
    batches: Indexable[U], start: int, stop: int, depth: int, workers: int, device: torch.device | None
) -> Iterator[U]:
    copies = None if device is None else Copies(device)

    def make(t: int) -> Underway[U]:
        batch = batches[t]
        return Underway(batch, (), None) if copies is None else copies.start(batch)

    executor = ThreadPoolExecutor(workers, thread_name_prefix="functrain-prefetch")
    try:
        ahead: deque[Future[Underway[U]]] = deque()
        ahead.extend(executor.submit(make, t) for t in range(start, min(start + depth, stop)))
        for t in range(start, stop):
            made = ahead.popleft().result()
            if t + depth < stop:
                ahead.append(executor.submit(make, t + depth))
            yield made.batch if copies is None else copies.finish(made)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
