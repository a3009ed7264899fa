"""How often a function is compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from functrain.compiler import engine


def assert_max_traces(n: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function so that tracing it more than `n` times, to be compiled, is an error.

    Goes inside the compilation: `ft.compile(assert_max_traces(1)(f))`. Calls that only run are not counted.

    Raises: ValueError for a negative n; AssertionError while tracing.
    """
    if n < 0:
        raise ValueError(f"assert_max_traces: expected n >= 0, came {n}")

    def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
        name, traces = getattr(fn, "__name__", repr(fn)), 0

        def note() -> None:
            nonlocal traces
            traces += 1
            if traces > n:
                raise AssertionError(
                    f"assert_max_traces({n}): {name} is traced for the {_ordinal(traces)} time; keep shapes, dtypes "
                    "and structure from call to call, and pass what changes as a tensor, not as a Python number"
                )

        @wraps(fn)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if engine.here.tracing and not engine.here.again:
                note()
            return fn(*args, **kwargs)

        return counted

    return decorate


def _ordinal(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")
