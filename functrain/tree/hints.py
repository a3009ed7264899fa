"""How an error names paths: the first of many, and what a misspelled one may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch

_SHOWN = 8  # names in one line


def listed(names: Sequence[str], others: Sequence[str] = ()) -> str:
    """Return the first names, each with the one of `others` that it may be a slip for."""
    shown = []
    for name in names[:_SHOWN]:
        near = nearest(name, others)
        shown.append(f"{name!r} (did you mean {near[0]!r}?)" if near else repr(name))
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def instead(name: str, names: Sequence[str]) -> str:
    """Return what there is instead of `name`: the likeliest of `names`, or the first ones when none is near."""
    return listed(nearest(name, names) or names) if names else "nothing, this node is empty"


def nearest(name: str, others: Sequence[str]) -> list[str]:
    """Return the one of `others` that a name may be a slip for, if any."""
    if torch.compiler.is_dynamo_compiling():  # Dynamo cannot trace difflib, and would say that instead of our error
        return []
    return difflib.get_close_matches(name, others, n=1, cutoff=0.75)
