"""Batches made ahead of time by background threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from functrain import tree

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
    batches moved there (on CUDA from pinned memory and without waiting). An error in batch t is raised when its turn
    comes, with the traceback of the thread. The threads start with the first batch asked for and end with the last,
    or when the iterator is closed or dropped.

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
    def make(t: int) -> U:
        batch = batches[t]
        if device is not None and device.type == "cuda":
            batch = tree.map(lambda x: x.pin_memory() if _on_host(x) else x, batch)
        return batch

    executor = ThreadPoolExecutor(workers, thread_name_prefix="functrain-prefetch")
    try:
        ahead: deque[Future[U]] = deque(executor.submit(make, t) for t in range(start, min(start + depth, stop)))
        for t in range(start, stop):
            batch = ahead.popleft().result()
            if t + depth < stop:
                ahead.append(executor.submit(make, t + depth))
            # moved by the consumer's thread, so that the copy is ordered with the consumer's own CUDA stream
            yield batch if device is None else tree.map(lambda x: _moved(x, device), batch)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _on_host(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type == "cpu"


def _moved(leaf: Any, device: torch.device) -> Any:
    return leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf  # a name of a file stays
