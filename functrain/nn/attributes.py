"""What a module remembers between calls, beside its buffers: nothing, or its result is no function of its arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# where recurrent layers of torch keep the parameters they were called with, and transformers that hooks by which it
# returns hidden states are there, from the first call on that asks for some
_TORCHS = {*vars(torch.nn.Module()), "_flat_weights", "_flat_weight_refs", "_output_capturing_hooks_installed"}


@contextmanager
def check_attributes(module: torch.nn.Module) -> Iterator[None]:
    """Raise when the code inside has changed an attribute of the module that is no buffer, and put it back.

    A list or dict in an attribute is looked at for its length alone.
    """
    if torch.compiler.is_dynamo_compiling():
        yield
        return
    before = [(part, dict(vars(part)), _marks(part)) for part in module.modules()]
    try:
        yield
    except BaseException:  # a trace that begins anew, too
        for part, values, _ in before:
            _put_back(part, values)
        raise
    for part, values, marks in before:
        after = _marks(part)
        if after == marks:
            continue
        name = next(n for n in {**marks, **after} if marks.get(n) != after.get(n))
        _put_back(part, values)
        raise RuntimeError(
            f"from_module: {type(part).__name__} changes its attribute {name!r} when it is called, so that its result "
            f"is not a function of its arguments; make it a buffer, by register_buffer({name!r}, tensor), or return "
            "it; where it follows from the shapes of a batch, call the module on one before from_module"
        )


def _put_back(part: torch.nn.Module, values: dict[str, Any]) -> None:
    for gone in set(vars(part)) - set(values):
        del vars(part)[gone]
    vars(part).update(values)


def _marks(part: torch.nn.Module) -> dict[str, Any]:
    return {name: _mark(value) for name, value in vars(part).items() if name not in _TORCHS}


def _mark(value: Any) -> Any:
    if isinstance(value, (int, float, str)):
        return (type(value), repr(value))
    if isinstance(value, Tensor):
        return (id(value), value._version)
    return (id(value), len(value)) if isinstance(value, (list, dict, set)) else id(value)
