"""How often a function is compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from functrain.transforms import Staged, engine


def assert_max_traces(n: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function so that tracing it more than `n` times, to be compiled, is an error.

    Goes inside the compilation: `ft.compile(assert_max_traces(1)(f))`; under `torch.compile` too. Calls that only run
    are not counted. Of a step each stage is counted by itself, since they may be compiled apart.

    Raises: ValueError for a negative n; AssertionError while tracing.
    """
    if n < 0:
        raise ValueError(f"assert_max_traces: expected n >= 0, came {n}")

    def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
        if isinstance(fn, Staged):  # ft.compile must still see the stages
            return Staged(decorate(fn.first), decorate(fn.second), looped=fn.looped)
        name, traces = getattr(fn, "__name__", repr(fn)), 0

        def note() -> None:
            nonlocal traces
            traces += 1
            if traces > n:
                raise AssertionError(
                    f"assert_max_traces({n}): {name} is traced for the {_ordinal(traces)} time; keep shapes, dtypes "
                    "and structure from call to call, and pass what changes as a tensor, not as a Python number"
                )

        # what Dynamo takes for a constant it calls once for each trace, and leaves out of the graph
        note = torch.compiler.assume_constant_result(note)

        @wraps(fn)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_dynamo_compiling() or engine.here.tracing:
                note()
            return fn(*args, **kwargs)

        return counted

    return decorate


def _ordinal(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")
