"""The arguments of a call, brought into one order, so that equal calls find the same program."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any


def by_position(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the arguments of `fn(*args, **kwargs)`, all of them by position.

    Raises: TypeError for arguments that `fn` does not take, or takes by keyword only.
    """
    bound = inspect.signature(fn).bind(*args, **kwargs)
    bound.apply_defaults()  # one that is left out before one that is given has a position too
    if bound.kwargs:
        names = ", ".join(bound.kwargs)
        raise TypeError(
            f"ft.compile: expected arguments that have a position, came {names}, which the function takes by keyword "
            f"only; bind it before, as in ft.compile(functools.partial(fn, {next(iter(bound.kwargs))}=...))"
        )
    return bound.args
