"""Batches brought to a device: to CUDA by a stream of its own, so that a copy runs beside the step before it."""

from __future__ import annotations

from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from functrain import tree

U = TypeVar("U")


class Underway(NamedTuple, Generic[U]):
    batch: U  # leaves of the host are copies that may not be there yet
    copied: tuple[Tensor, ...]  # these
    arrived: torch.cuda.Event | None  # None where nothing is copied ahead


class Copies:
    """Copies to one device: `start` runs in any thread ahead of time, `finish` in the one that uses the batch."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, None
        if device.type == "cuda":
            # named here: another thread's current device is another one
            index = torch.cuda.current_device() if device.index is None else device.index
            self._device = torch.device("cuda", index)
            self._stream = torch.cuda.Stream(self._device)

    def start(self, batch: U) -> Underway[U]:
        """Begin to copy what lies on the host, from pinned memory, which alone is copied while Python goes on."""
        if self._stream is None:
            return Underway(batch, (), None)
        copied: list[Tensor] = []

        def copy(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.device.type != "cpu" or leaf.layout != torch.strided:
                return leaf
            # the allocator of pinned memory knows of the copy, and gives none away that is still read
            copied.append(leaf.pin_memory().to(self._device, non_blocking=True))
            return copied[-1]

        with torch.cuda.stream(self._stream):
            batch = tree.map(copy, batch)
            arrived = torch.cuda.Event()
            arrived.record()
        return Underway(batch, tuple(copied), arrived)

    def finish(self, underway: Underway[U]) -> U:
        """Return the batch on the device, for work of the current stream, which waits for the copy; Python does not."""
        if underway.arrived is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_event(underway.arrived)
            for leaf in underway.copied:
                # it is memory of the copying stream, which would write the next batch there while this one is in use
                leaf.record_stream(here)
        # what is elsewhere still: on another device, or of a device that has no such streams
        return tree.map(lambda leaf: leaf.to(self._device) if isinstance(leaf, Tensor) else leaf, underway.batch)
