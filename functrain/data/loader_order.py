"""What is known of the order in which a DataLoader gives its batches, and how an epoch is made to repeat."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch.utils import data as torch_data


class Shuffling:
    """What is told of an epoch before it begins: the generators that draw in it, and who has a `set_epoch`."""

    def __init__(self, generators: Sequence[_Generator], told: Sequence[Any]) -> None:
        self._generators, self._told = generators, told

    def begin(self, epoch: int) -> None:
        for generator in self._generators:
            generator.manual_seed((generator.first_seed + epoch) % 2**64)
        for part in self._told:
            part.set_epoch(epoch)

    @property
    def description(self) -> dict[str, list[int]]:
        told = [part.seed for part in self._told if isinstance(getattr(part, "seed", None), int)]
        return {"seeds": [generator.first_seed for generator in self._generators] + told}


def shuffling_of(batches: Any, seed: int | None) -> Shuffling:
    """Find what draws in a DataLoader; with a seed, give its sampler and its workers a generator.

    Raises: ValueError for a seed that nothing would be drawn from.
    """
    if seed is not None:
        _give_generator(batches, index(seed))
    parts = [getattr(batches, name, None) for name in ("sampler", "batch_sampler", "dataset")]
    told = [part for part in (batches, *parts) if hasattr(part, "set_epoch")]
    own: dict[torch.Generator, _Generator] = {}
    for part in (batches, *parts[:2]):
        generator = getattr(part, "generator", None)
        if isinstance(generator, _Generator):
            own[generator] = generator
        elif isinstance(generator, torch.Generator):
            # in its place, as the caller may draw from that elsewhere
            part.generator = own.setdefault(generator, _Generator(generator.initial_seed()))
    return Shuffling(list(dict.fromkeys(own.values())), told)


def has_known_order(batches: Any) -> bool:
    """Tell whether an epoch that is begun anew gives the same batches again."""
    if not isinstance(batches, torch_data.DataLoader):
        return hasattr(batches, "__getitem__") and hasattr(batches, "__len__")
    if isinstance(batches.dataset, torch_data.IterableDataset):
        return False
    if type(batches.batch_sampler) not in (torch_data.BatchSampler, type(None)):
        return _repeats(batches.batch_sampler)
    return type(batches.sampler) is torch_data.SequentialSampler or _repeats(batches.sampler)


def exact_size(batches: Any) -> int | None:
    """Give the number of batches of an epoch, if it is known: an IterableDataset's length is an estimate."""
    if isinstance(getattr(batches, "dataset", batches), torch_data.IterableDataset) or not hasattr(batches, "__len__"):
        return None
    try:
        return len(batches) or None
    except TypeError:  # a DataLoader has a length where its dataset and sampler have one
        return None


def name_of(source: Any) -> str:
    """Give a dataset's own fingerprint, or its type and length."""
    own = getattr(source, "fingerprint", None)
    try:
        rows = f" of {len(source)}"
    except TypeError:
        rows = ""
    return own if isinstance(own, str) else f"{type(source).__qualname__}{rows}"


def _give_generator(batches: Any, seed: int) -> None:
    sampler: Any = getattr(batches, "sampler", None)
    if not isinstance(batches, torch_data.DataLoader) or not hasattr(sampler, "generator"):
        raise ValueError(
            f"loader: nothing is drawn from seed={seed} by this {type(batches).__name__}; leave it out, or make a "
            "torch DataLoader with shuffle=True"
        )
    if sampler.generator is not None:
        raise ValueError(
            "loader: the sampler has a generator already, which is used; leave out seed=, or seed that one"
        )
    if not 0 <= seed < 2**64:
        raise ValueError(f"loader: expected a seed in [0, 2**64), came {seed}")
    # it seeds the workers, too
    sampler.generator = batches.generator = _Generator(seed)


class _Generator(torch.Generator):
    """A generator that knows what it was seeded with at first, whatever epoch it was seeded for since."""

    first_seed: int

    def __new__(cls, seed: int) -> _Generator:
        made = super().__new__(cls)
        made.first_seed = seed
        made.manual_seed(seed)
        return made


def _repeats(sampler: Any) -> bool:
    return hasattr(sampler, "set_epoch") or isinstance(getattr(sampler, "generator", None), torch.Generator)
