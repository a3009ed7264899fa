"""Batches of rows of one's own data: images and labels, a table, a dataset. B batch, N rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from operator import index
from typing import Any, Literal, TypeAlias, get_args, overload

import numpy as np
import torch
from torch import Tensor

from functrain import random
from functrain.data.order import Last, Rows
from functrain.data.sources import Source, source_of
from functrain.tree import Batch

Transform: TypeAlias = Callable[[Batch, Tensor], Batch]


class Batches:
    """An endless row of batches: `batches[t]` is a pure function of t, to be had at any time, by any thread."""

    def __init__(self, source: Source, order: Rows, seed: int | None, transform: Transform | None) -> None:
        self.source, self.order, self.seed, self.transform = source, order, seed, transform

    def __getitem__(self, t: int) -> Batch:
        t, stop = index(t), self.order.total()
        if not 0 <= t < (2**63 if stop is None else stop):
            expected = "a step t of 0 or more" if stop is None else f"a batch in [0, {stop})"
            raise IndexError(f"batches: expected {expected}, came {t}")
        indices = self.order.indices(t)
        rows = len(indices)
        if self.order.last == "filled":
            indices = np.pad(indices, (0, self.order.batch - rows), mode="edge")
        # continued past an end and filled, rows that lie side by side do not stay so
        batch = self.source.take(
            indices, self.order.seed is None and bool(indices[-1] - indices[0] == len(indices) - 1)
        )
        if self.order.last == "filled":
            batch = _masked(batch, torch.arange(self.order.batch) < rows)
        return batch if self.transform is None else self.transform(batch, _key(self.seed, t))

    @property
    def steps_per_epoch(self) -> float:
        """The number of batches of an epoch, a fraction where they go on into the next."""
        return self.order.steps_per_epoch

    @property
    def description(self) -> dict[str, str | int | None]:
        """What decides a batch: of two with equal descriptions, the batches that both have are equal.

        Of a transform it is the name; of a Dataset that has no `fingerprint` of its own, the type and the length.
        """
        order, fn = self.order, self.transform
        return {
            "source": self.source.fingerprint,
            "order": "as they lie" if order.seed is None else "shuffled",
            "rows": order.rows,
            "batch": order.batch,
            "seed": self.seed,
            "last": order.last,
            "transform": None if fn is None else getattr(fn, "__qualname__", type(fn).__qualname__),
        }  # and not the number of epochs, so that a run may be given more of them

    @property
    def fingerprint(self) -> str:
        """sha256 of the description, for a checkpoint to keep."""
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()


class FiniteBatches(Batches):
    """Batches that end."""

    def __len__(self) -> int:
        return self.order.total() or 0

    def __iter__(self) -> Iterator[Batch]:
        return (self[t] for t in range(len(self)))


@overload
def batches(
    source: Any,
    *,
    batch: int,
    seed: int | None = ...,
    shuffle: Literal[False],
    epochs: int | None = ...,
    last: Last = ...,
    transform: Transform | None = ...,
) -> FiniteBatches: ...
@overload
def batches(
    source: Any,
    *,
    batch: int,
    seed: int | None = ...,
    shuffle: bool = ...,
    epochs: int,
    last: Last = ...,
    transform: Transform | None = ...,
) -> FiniteBatches: ...
@overload
def batches(
    source: Any,
    *,
    batch: int,
    seed: int | None = ...,
    shuffle: bool = ...,
    epochs: int | None = ...,
    last: Last = ...,
    transform: Transform | None = ...,
) -> Batches: ...
def batches(
    source: Any,
    *,
    batch: int,
    seed: int | None = None,
    shuffle: bool = True,
    epochs: int | None = None,
    last: Last = "continued",
    transform: Transform | None = None,
) -> Batches:
    """Give batches of the rows of `source`, each row once per epoch, shuffled anew for each epoch.

    A source is taken as it is: a tree of arrays, tensors or lists of numbers with one first dimension, memory-mapped
    ones too (`np.load(path, mmap_mode="r")`), such as the columns that `read_csv` gives; a list of rows, dicts or
    tuples; a pandas DataFrame; a map-style Dataset of torch or of Hugging Face. A batch is a tree like it, or like a
    row of it, of tensors in new memory: dtypes are kept, and Python's numbers become what `torch.tensor` makes of them.

    Shuffled, the row of batches has no end, as training wants it; with `shuffle=False` it is one pass over the rows as
    they lie, for validation; both are as long as `epochs` says, and have a `len` then. `last` says what is at the end
    of an epoch: "continued", a batch goes on into the next epoch, and is short only where there is none; "short", each
    epoch ends with what is left; "filled", that is filled with copies of its last row, and every batch has a `mask`
    (B,), True for rows that count: the leaf "mask" of a dict, one more element of a tuple; "dropped", it is left out.

    `transform(batch, key)` returns the batch that is given, for augmentation and casts; the key is one of `ft.random`,
    a pure function of the seed and t. For each row alone, map it: `ft.vmap(fn)(batch, ft.random.split(key, B))`.

    Shapes: a leaf (N, ...) becomes (batch, ...).
    Raises: ValueError, or TypeError, naming the leaf that has no numbers, other rows, or a dtype that torch has not;
    for a seed that is missing, or that nothing is drawn from.

    >>> rows = {"x": torch.arange(10.0).reshape(5, 2), "label": torch.tensor([0, 1, 0, 1, 1])}
    >>> batches = ft.data.batches(rows, batch=2, seed=0)  # shuffled and endless: for ft.fit
    >>> batches[1_000]["x"].shape
    torch.Size([2, 2])
    >>> [batch["label"].tolist() for batch in ft.data.batches(rows, batch=2, shuffle=False)]  # one pass: for validation
    [[0, 1], [0, 1], [1]]
    """
    found = source_of(source)
    size = index(batch)
    if size < 1 or found.rows < 1:
        raise ValueError(f"batches: expected batch and rows of 1 or more, came batch={size} of {found.rows} rows")
    if last not in get_args(Last):
        raise ValueError(f"batches: expected last to be one of {', '.join(get_args(Last))}, came {last!r}")
    if last == "dropped" and found.rows < size:
        raise ValueError(f"batches: last='dropped' leaves none of {found.rows} rows in batches of {size}; use 'short'")
    if epochs is not None and index(epochs) < 1:
        raise ValueError(f"batches: expected epochs of 1 or more, came {epochs}")
    seed = _seed(seed, shuffle, transform)
    passes = index(epochs) if epochs is not None else None if shuffle else 1
    order = Rows(found.rows, size, seed if shuffle else None, last, passes)
    example = found.take(np.zeros(1, np.int64), False)  # a dataset's rows are looked at now, and not in training
    if last == "filled":
        _masked(example, torch.ones(1, dtype=torch.bool))
    return (Batches if passes is None else FiniteBatches)(found, order, seed, transform)


def _seed(seed: int | None, shuffle: bool, transform: Transform | None) -> int | None:
    if seed is None:
        if shuffle or transform is not None:
            raise ValueError("batches: expected a seed to shuffle by; write seed=0, or shuffle=False for validation")
        return None
    if not shuffle and transform is None:
        raise ValueError(
            f"batches: nothing is drawn from seed={seed} with shuffle=False and no transform; leave it out"
        )
    if not 0 <= index(seed) < 2**64:
        raise ValueError(f"batches: expected a seed in [0, 2**64), came {seed}")
    return index(seed)


def _masked(batch: Batch, mask: Tensor) -> Batch:
    if type(batch) is dict and "mask" not in batch:
        return batch | {"mask": mask}
    if type(batch) is tuple:
        return (*batch, mask)
    came = "a dict with a 'mask'" if isinstance(batch, dict) else f"a {type(batch).__name__}"
    raise ValueError(
        f"batches: last='filled' puts a mask into a dict, as 'mask', or behind a tuple, came {came}; give the source "
        "as a dict without one"
    )


def _key(seed: int | None, t: int) -> Tensor:
    assert seed is not None
    # folded in twice: the key of step t of a run with this seed must not be that of its augmentation
    return random.fold_in(random.fold_in(random.key(seed), 0x64617461), t)  # "data"
