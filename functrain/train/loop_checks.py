"""What the loop is given: a state, batches, a number of steps, hooks; and where in its batches a run goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from functrain.data.loader_order import exact_size
from functrain.train.checks import takes
from functrain.train.state import TrainState


def check_fit(step: Any, state: Any, batches: Any, every: Any) -> None:
    """Raise a TypeError for an argument of another kind, before the first step is taken.

    A step of one's own may have any state with a `step`.
    """
    if not callable(step) or not isinstance(getattr(state, "step", None), Tensor):
        came = ", ".join(type(x).__name__ for x in (step, state, batches))
        raise TypeError(
            f"fit: expected (step, state, batches), a function, a state of init_state and batches, came ({came})"
        )
    if not takes(step, 2):
        raise TypeError(
            "fit: expected step(state, batch), came a function of other arguments; make it by ft.train_step"
        )
    _check_batches(batches)
    if not isinstance(every, Sequence) or isinstance(every, str):
        raise TypeError(f"fit: expected every= to be a list of hooks, came {type(every).__name__}; write every=[hook]")
    for hook in every:
        check_hook("fit: every=", hook)


def check_hook(what: str, hook: Any) -> None:
    """Raise a TypeError for what is no function of (t, state, metrics)."""
    if not callable(hook):
        raise TypeError(
            f"{what}: expected a hook(t, state, metrics), came {type(hook).__name__} {hook!r}; pass the function, not "
            "what it returns"
        )
    if not takes(hook, 3, follow_wrapped=False):
        name = getattr(hook, "__name__", type(hook).__name__)
        raise TypeError(f"{what}: expected a hook(t, state, metrics), came {name}, which does not take three arguments")


def count(what: str, name: str, value: Any) -> int:
    """Return a number of steps.

    Raises: TypeError for what is no integer.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return index(value)
    except TypeError:
        way_out = "pass a large one for a run without an end" if value is None else f"write int({name})"
        came = f"{type(value).__name__} {value!r}"
        raise TypeError(f"{what}: expected {name} to be an int, a number of steps, came {came}; {way_out}") from None


def is_indexed(batches: Any) -> bool:
    """Tell whether batches can be asked for by number: an IterableDataset of torch has a __getitem__ that raises."""
    getitem = getattr(type(batches), "__getitem__", None)
    return getitem is not None and getitem is not torch.utils.data.Dataset.__getitem__


def goes_on(batches: Any, start: int) -> Iterator[Any]:
    """Return an iterator of the batches from number `start` on; an iterator is where the caller left it.

    What is iterated anew for each epoch, as a DataLoader, is at its first batch where an epoch ends; within an epoch, a
    DataLoader without shuffling is read up to where the run was.

    Raises: ValueError where nobody knows which batches the run has seen.
    """
    if isinstance(batches, Iterator):
        return batches
    at = start % size if (size := exact_size(batches)) else start
    found: Iterator[Any] = iter(batches)
    if at and not _in_order(batches):
        raise ValueError(
            f"fit: the state has read {start} batches, and this {type(batches).__name__} begins at its first one, in "
            "an order that is not known; give ft.data.loader(dataloader, seed=0), which goes on in an epoch, or "
            "batches[t] by number, as ft.data.batches does, or an iterator that stands there, as "
            "itertools.islice(batches, t, None), or iter(batches) to begin at the first"
        )
    for _ in range(at):
        next(found, None)
    return found


def _in_order(batches: Any) -> bool:
    loaders = torch.utils.data
    return (
        isinstance(batches, loaders.DataLoader)
        and not isinstance(batches.dataset, loaders.IterableDataset)
        and (batches.batch_sampler is None or type(batches.batch_sampler) is loaders.BatchSampler)
        and isinstance(batches.sampler, loaders.SequentialSampler)
    )


def _check_batches(batches: Any) -> None:
    one = "one batch; write itertools.repeat(batch) to train on it alone, or [batch, ...]"
    if isinstance(batches, Mapping):
        raise TypeError(f"fit: expected batches, one for each step, came a {type(batches).__name__} of tensors, {one}")
    if isinstance(batches, tuple) and batches and all(isinstance(x, (Tensor, np.ndarray)) for x in batches):
        raise TypeError(f"fit: expected batches, one for each step, came a tuple of {len(batches)} arrays, {one}")
    if not (is_indexed(batches) or hasattr(batches, "__iter__")) or isinstance(batches, (str, TrainState)):
        raise TypeError(
            f"fit: expected batches, as ft.data.windows makes, a list or an iterator, came {type(batches).__name__}; "
            "of a function of t, pass (fn(t) for t in range(steps))"
        )
