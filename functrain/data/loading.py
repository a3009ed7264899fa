"""A DataLoader, or anything else that is iterated anew for each epoch, as batches by number without an end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from operator import index
from threading import RLock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from functrain import tree
from functrain.data.loader_order import Shuffling, exact_size, has_known_order, name_of, shuffling_of
from functrain.tree import Batch


class Loader:
    """An endless row of batches, read one after another wherever that can be; see `loader`."""

    def __init__(self, batches: Iterable[Any], shuffling: Shuffling) -> None:
        self.batches, self._shuffling = batches, shuffling
        self._known, self._size = has_known_order(batches), exact_size(batches)
        self._lock = RLock()  # a DataLoader is at one place at a time, whoever asks
        self._iterator: Iterator[Any] | None = None
        self._t = self._epoch = self._number = 0  # of the batch that the iterator gives next

    def __getitem__(self, t: int) -> Batch:
        t = index(t)
        if t < 0:
            raise IndexError(f"loader: expected a step t of 0 or more, came {t}")
        with self._lock:
            if self._iterator is None or t != self._t:
                self._seek(t)
            batch = self._next()
        return tree.map(_tensor, batch)

    @property
    def steps_per_epoch(self) -> float | None:
        """The number of batches of an epoch; None if nobody knows."""
        return None if self._size is None else float(self._size)

    @property
    def description(self) -> dict[str, str | int | list[int] | None]:
        """What is known of what decides every batch. Of a Dataset that is its own `fingerprint`, or type and length."""
        sampler = getattr(self.batches, "sampler", None)
        return {
            "source": name_of(getattr(self.batches, "dataset", self.batches)),
            "batch": getattr(self.batches, "batch_size", None),
            "batches": self._size,
            "sampler": None if sampler is None else type(sampler).__qualname__,
            "order": "known" if self._known else "unknown",
            **self._shuffling.description,
        }

    @property
    def fingerprint(self) -> str:
        """sha256 of the description, for a checkpoint to keep."""
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()

    def _seek(self, t: int) -> None:
        epoch, number = (0, t) if self._size is None else divmod(t, self._size)
        if number and (self._size is None or not self._known):
            raise ValueError(
                f"loader: batch {t} was asked for, and this {type(self.batches).__name__} begins at the first of an "
                "epoch, in an order that is not known; write ft.data.loader(dataloader, seed=0) where it shuffles a "
                "dataset with a length, or give rows to ft.data.batches, whose every batch can be had by its number"
            )
        self._begin(epoch)
        for _ in range(number):
            self._next()

    def _begin(self, epoch: int) -> None:
        self._shuffling.begin(epoch)
        self._iterator, self._epoch, self._number = iter(self.batches), epoch, 0
        self._t = 0 if self._size is None else epoch * self._size

    def _next(self) -> Any:
        iterator, self._iterator = self._iterator, None  # after an error nobody knows where it is
        assert iterator is not None
        batch = next(iterator, _END)
        if batch is not _END:
            self._iterator, self._t, self._number = iterator, self._t + 1, self._number + 1
            return batch
        if self._number != (self._size or self._number) or not self._number:
            expected = "at least one batch" if self._size is None else f"{self._size} batches, as its len says"
            raise ValueError(
                f"loader: expected {expected} in each epoch, came {self._number} in epoch {self._epoch} of this "
                f"{type(self.batches).__name__}; give what can be iterated anew, or correct its __len__"
            )
        t = self._t
        self._begin(self._epoch + 1)
        self._t = t
        return self._next()


def loader(batches: Iterable[Any], *, seed: int | None = None) -> Loader:
    """Give the batches of a torch DataLoader, or of what else can be iterated anew, epoch after epoch, without an end.

    `ft.fit` reads it ahead in a thread, pins it, and moves it to the device of the state; for a loop of your own
    `ft.data.prefetch(loader(dataloader), start, stop, device=...)` does. Batches keep their structure, and arrays in
    them become tensors.

    A resumed run goes on at its batch: where it stopped within an epoch, those of before are read and passed over.
    For that the order must be known, as it is without shuffling, of a sampler with `set_epoch`, which is told each
    epoch, and of a shuffling DataLoader with a `generator`: epoch e is drawn with the seed of that + e, so that the
    first epoch is the DataLoader's own. `seed=` gives it such a generator. Of others only the beginning of an epoch is
    known, and asking for a batch within is an error. What a Dataset draws for itself is the same again only in workers
    (`num_workers`) of a DataLoader with a generator; better draw in a transform of `ft.data.batches`.

    Raises: TypeError for what is not iterated anew; ValueError for a seed that nothing is drawn from, and, at its turn,
    for a batch whose place is not known, and an epoch of another length than `len` says.

    >>> dataset = torch.utils.data.TensorDataset(torch.arange(4))
    >>> batches = ft.data.loader(torch.utils.data.DataLoader(dataset, batch_size=2, shuffle=True), seed=0)
    >>> sorted(batches[10][0].tolist() + batches[11][0].tolist())  # the sixth epoch
    [0, 1, 2, 3]
    """
    if not isinstance(batches, Iterable) or isinstance(batches, _NO_BATCHES):
        raise TypeError(
            f"loader: expected a DataLoader, or batches that can be iterated anew, came {type(batches).__name__}; give "
            "ft.fit an iterator as it is, and ft.data.batches the rows of a dataset"
        )
    return Loader(batches, shuffling_of(batches, seed))


_END = object()
_NO_BATCHES = (Iterator, Tensor, np.ndarray, Mapping, str, bytes)


def _tensor(leaf: Any) -> Any:
    if not isinstance(leaf, np.ndarray) or leaf.dtype.kind not in "biufc":
        return leaf
    return torch.from_numpy(leaf if leaf.flags.writeable else leaf.copy())
