"""What a step and a loop are given, and what a loss does: mistakes told in one sentence, with the way out.

Structure, shapes and types alone are looked at, in a trace once; no number is read.
"""

from __future__ import annotations

import inspect
import linecache
import re
import traceback
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from functrain import tree
from functrain.compiler import engine
from functrain.optim import GradientTransformation, OptState, Updates
from functrain.optim.transformation import check_own_state
from functrain.transforms import captured
from functrain.tree import Batch, Params


def watched(what: str, first: Callable[[Any, Batch], Any]) -> Callable[[Any, Batch], Any]:
    """Make the first stage of a step one that leaves batch and generators as they are.

    The loss gets containers of its own: a key that it puts into the batch is not there in the next epoch. The first
    call in eager looks at torch's global generators; a trace has an error of its own for them.

    Raises: TypeError naming a leaf of the batch that is an array of numpy, and for a loss that draws from a global
    generator; ValueError naming a leaf of the batch that it has written into.
    """
    seen = False

    def watching(state: Any, batch: Batch) -> Any:
        nonlocal seen
        batch = tree.map(lambda leaf: leaf, batch)
        leaves = tree.leaves(batch)
        _check_arrays(what, batch, leaves)
        before = [_version(leaf) for leaf in leaves]
        if seen or engine.here.tracing or engine.nested() or torch.compiler.is_dynamo_compiling():
            found = first(state, batch)
        else:
            found = _drawing_nothing(what, lambda: first(state, batch), leaves)
            seen = True
        if [_version(leaf) for leaf in leaves] != before:
            path = next(p for (p, x), old in zip(tree.items(batch), before, strict=True) if _version(x) != old)
            raise ValueError(
                f"{what}: {_in_batch(path)}: the loss has written into this tensor, which is the caller's and comes "
                "again in the next epoch; compute a new one, as in x = x + 1 for x += 1"
            )
        return found

    return watching


def call(what: str, loss_fn: Callable[..., Any], names: str, *args: Any) -> Any:
    """Return `loss_fn(*args)`, whose arguments are named `names`, the batch the last but one.

    Raises: TypeError for a loss that takes other arguments, or the batch as what it is not; what it raises else.
    """
    try:
        return loss_fn(*args)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        came = _signature(loss_fn)
        if not takes(loss_fn, len(args)):
            more = "; buffers=True is for loss_fn(params, buffers, batch, key)" if len(args) == 3 else ""
            raise TypeError(
                f"{what}: expected loss_fn({names}), came {came}; give it these arguments, those too that it does not "
                f"use{more}"
            ) from error
        reason = _of_the_batch(args[-2], error)
        if reason is None:
            raise
        raise TypeError(f"{what}: {came}: {reason}") from error


def update(
    what: str, tx: GradientTransformation, grads: Updates, state: OptState, params: Params, **extra_args: Any
) -> tuple[Updates, OptState]:
    """Return what `tx` makes of the gradients, the opt_state of a TrainState and params.

    Raises: ValueError for an opt_state that is another optimizer's, or that of other params.
    """
    try:
        updates, new = tx.update(grads, state, params, **extra_args)
    except (AttributeError, IndexError, KeyError, TypeError):
        check_own_state(f"{what}: opt_state", state, tx.init(params))
        raise
    check_own_state(f"{what}: opt_state", state, new)
    return updates, new


def metrics(what: str, given: Any, taken: Collection[str]) -> dict[str, Tensor]:
    """Return the metrics of a loss, numbers as () tensors.

    Raises: TypeError for what is no dict of () tensors, ValueError for a name that the step has `taken`.
    """
    if not isinstance(given, dict):
        raise TypeError(f"{what}: expected metrics in a dict, came {type(given).__name__}; pass {{}} for none")
    found = {}
    for name, value in given.items():
        if name in taken:
            raise ValueError(
                f"{what}: expected metrics of other names than the step's own, {', '.join(taken)}, came {name!r}; "
                "rename it"
            )
        if isinstance(value, (int, float)):
            value = torch.tensor(float(value))
        if not isinstance(value, Tensor) or value.dim() != 0:
            came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            way_out = "take its sum over the batch" if isinstance(value, Tensor) else "flatten it, or leave it out"
            raise TypeError(f"{what}: metric {name!r}: expected a () tensor, came {came}; {way_out}")
        found[name] = value
    return found


def takes(fn: Callable[..., Any], count: int, *, follow_wrapped: bool = True) -> bool:
    """Tell whether a function can be called with so many arguments by position; True where nobody knows."""
    try:
        signature = inspect.signature(fn, follow_wrapped=follow_wrapped)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def _signature(fn: Callable[..., Any]) -> str:
    name = getattr(fn, "__name__", type(fn).__name__)
    try:
        return f"{name}{inspect.signature(fn)}"
    except (TypeError, ValueError):
        return name


def _of_the_batch(batch: Batch, error: Exception) -> str | None:
    """Explain an error of an expression that takes the batch for another kind of container."""
    says = str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    code = linecache.getline(last.filename, last.lineno or 0)
    if "unpack" not in says:  # of which Python marks what is assigned to
        code = code[last.colno : last.end_colno if last.end_lineno == last.lineno else None]
    frame = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    names = [name for name, value in frame.f_locals.items() if _alike(value, batch)]
    if not any(re.search(rf"\b{name}\b", code) for name in names):
        return None
    if isinstance(batch, dict):
        if isinstance(error, KeyError):
            missing = bool(error.args) and error.args[0] not in batch
            return f"the batch has no {error.args[0]!r}; there is {list(batch)}" if missing else None
        if "'str'" in says or "unpack" in says:
            return f"the batch is a dict of {list(batch)}, which unpacks to its keys; take its entries by name"
        return None
    if isinstance(error, KeyError):
        return None
    if not any(text in says for text in ("indices must be", "not subscriptable", "'str'", "slices", "unpack")):
        return None
    if isinstance(batch, (tuple, list)):
        came = f"a {type(batch).__name__} of {len(batch)}"
        return f"the batch is {came}, without names; write x, y = batch, or make batches {{'x': x, 'y': y}}"
    came = f"a tensor of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else f"a {type(batch).__name__}"
    return f"the batch is {came}; make batches of what the loss takes, such as {{'x': x, 'y': y}}"


def _alike(value: Any, batch: Batch) -> bool:
    """Tell whether a value is the batch, or what a cast made of it."""
    if type(value) is not type(batch):
        return False
    if isinstance(batch, Tensor):
        return bool(value.shape == batch.shape)
    return bool(value.keys() == batch.keys() if isinstance(batch, dict) else tree.paths(value) == tree.paths(batch))


def _check_arrays(what: str, batch: Batch, leaves: list[Any]) -> None:
    if any(isinstance(leaf, np.ndarray) for leaf in leaves):
        path = next(path for path, leaf in tree.items(batch) if isinstance(leaf, np.ndarray))
        raise TypeError(
            f"{what}: {_in_batch(path)}: expected a tensor, came an array of numpy; make it one by torch.from_numpy"
        )


def _in_batch(path: str) -> str:
    return f"batch: {path}" if path else "the batch"


def _version(leaf: Any) -> int | None:
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else None


def _drawing_nothing(what: str, first: Callable[[], Any], leaves: list[Any]) -> Any:
    accelerators = {x.device.index for x in leaves if isinstance(x, Tensor) and x.is_cuda}
    generators = [torch.default_generator, *[torch.cuda.default_generators[i] for i in accelerators]]
    before = [generator.get_state() for generator in generators]
    found = first()
    if captured.have_moved(before, generators) and captured.draws(first):
        for generator, old in zip(generators, before, strict=True):
            generator.set_state(old)
        raise TypeError(
            f"{what}: the loss draws from torch's global generator, as F.dropout and torch.randn do, so that a run "
            "that is started again would be another one; draw from its key, as by ft.nn.dropout or ft.random.normal"
        )
    return found
