"""One function run in several ways that must agree."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeAlias

import torch
from torch import Tensor

from functrain import transforms, tree

Variant: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]


def variants(*names: str) -> list[Variant]:
    """Return ways to run a function, "eager", "compiled" and "vmapped", or those of them that are named.

    For a test that is written once: `@pytest.mark.parametrize("variant", variants())`, then `variant(fn)(*args)`, which
    equals `fn(*args)` bit for bit in eager, and to rounding otherwise. The names are the ids of the tests.

    Raises: ValueError for another name.
    """
    unknown = [name for name in names if name not in _VARIANTS]
    if unknown:
        raise ValueError(f"variants: expected names out of {', '.join(_VARIANTS)}, came {unknown}")
    return [_VARIANTS[name] for name in names or _VARIANTS]


def eager(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function itself."""
    return fn


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return `ft.compile(fn)`."""
    return transforms.compile(fn)


def vmapped(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Map the function over two copies of its tensors, and return the second result.

    The function's results must be tensors, as of everything that is mapped.
    """

    @wraps(fn)
    def second_lane(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = tree.flatten((args, kwargs))
        tensors = [torch.stack([leaf, leaf]) for leaf in leaves if isinstance(leaf, Tensor)]
        result: list[Any] = []

        # flat lists in and out: torch's own trees know neither None nor our dataclasses
        def lane(*mapped: Tensor) -> list[Tensor]:
            rest = iter(mapped)
            given = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args, kwargs = tree.unflatten(structure, given)
            made = fn(*args, **kwargs)
            for path, leaf in tree.items(made):
                if not isinstance(leaf, Tensor):
                    raise TypeError(f"vmapped: {path}: expected a tensor, came {leaf!r}; return torch.tensor(...)")
            found, result[:] = tree.flatten(made)[0], [tree.structure(made)]
            return found

        if not tensors:
            return fn(*args, **kwargs)
        made = transforms.vmap(lane)(*tensors)
        return tree.unflatten(result[0], [leaf[1] for leaf in made])

    return second_lane


_VARIANTS: dict[str, Variant] = {"eager": eager, "compiled": compiled, "vmapped": vmapped}
