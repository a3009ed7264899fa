"""The arguments of a compiled call: brought into one order, and what of them a program depends on."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from torch import Tensor

from functrain import tree

TIMES = 3  # that a function is compiled for other shapes without a word


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


def kind_of(leaf: Any) -> Any:
    """Return what of a leaf a compiled program depends on."""
    if isinstance(leaf, Tensor):
        return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device, type(leaf), leaf.is_conj(), leaf.is_neg())
    return same_value(leaf)


def same_value(value: Any) -> Any:
    """Return what two values that are no tensors have in common where a trace treats them alike: 1 is not 1.0 nor True,
    and 0.0 not -0.0; NaN is NaN."""
    return (type(value), repr(value) if isinstance(value, (float, complex)) else value)


def tell_of_another(args: Any, before: Any, now: Any) -> None:
    """Warn that a function is compiled once more, and name an argument that is the reason."""
    paths = [path for path, _ in tree.items(args)]
    path, old, new = next((p, a, b) for p, a, b in zip(paths, before, now, strict=True) if a != b)
    warnings.warn(
        f"ft.compile: compiled for the {TIMES + 1}th time: argument {path} is {new[:3]}, and was {old[:3]}; each "
        "shape, dtype and value of what is no tensor is a program: pad to one shape, or pass numbers as tensors",
        stacklevel=4,
    )


def unhashable(args: Any) -> TypeError:
    """Return the error of an argument that no program can be looked up by."""
    path, leaf = next((path, leaf) for path, leaf in tree.items(args) if not isinstance(leaf, Hashable))
    return TypeError(
        f"ft.compile: argument {path}: expected a tensor, or a value with a hash, for which a program is made, came "
        f"{type(leaf).__name__}; convert it outside, as by torch.as_tensor(x), or dict(x)"
    )
