"""Which token follows: checks of what is asked for, and a draw from truncated logits.

B batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from operator import index
from typing import Any, TypeAlias

import torch
from torch import Tensor

from functrain import random

Choose: TypeAlias = Callable[[Tensor, int], Tensor]  # from logits (B, V) and the step to tokens (B,)


def chooser(
    batch: int, key: Tensor | None, steps: int, temperature: float, top_k: int | None, top_p: float | None
) -> Choose:
    """Return the function that chooses the tokens of a step, as `generate` says.

    Raises: TypeError and ValueError.
    """
    top_k = None if top_k is None else count("top_k", top_k, 1, "; None draws among all tokens")
    for name, value in (("temperature", temperature), ("top_p", 1.0 if top_p is None else top_p)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"generate: expected {name} to be a number, came {type(value).__name__} {value!r}")
    if not temperature >= 0.0:
        raise ValueError(f"generate: expected a temperature of at least 0, came {temperature}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"generate: expected top_p in (0, 1], came {top_p}; None draws among all tokens")
    if temperature == 0.0:
        return lambda logits, step: torch.argmax(logits, -1)
    points = _points(key, batch, steps)  # (steps, B)
    return lambda logits, step: _draw(logits.double() / temperature, points[step], top_k, top_p)


def check_prompt(tokens: Any) -> None:
    """Refuse what is no prompt (B, T) of integers. Raises: TypeError, ValueError."""
    if not isinstance(tokens, Tensor):
        raise TypeError(
            f"generate: expected a prompt (B, T), an integer tensor, came {type(tokens).__name__}; encode a text as "
            "torch.as_tensor(tokenizer.encode(text).astype(int))[None]"
        )
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise TypeError(f"generate: expected a prompt of integers, came {tokens.dtype}; pass tokens.long()")
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        way_out = "; a single one is tokens[None]" if tokens.ndim == 1 and len(tokens) else ""
        came = tuple(tokens.shape)
        raise ValueError(f"generate: expected a prompt (B, T) of at least one token, came {came}{way_out}")


def count(name: str, value: Any, least: int, way_out: str) -> int:
    """Return a whole number of at least `least`. Raises: TypeError, ValueError."""
    try:
        found = index(value)
    except TypeError:
        found = None
    if found is None or isinstance(value, bool):
        raise TypeError(f"generate: expected {name} to be an int, came {type(value).__name__} {value!r}{way_out}")
    if found < least:
        raise ValueError(f"generate: expected {name} of at least {least}, came {found}{way_out}")
    return found


def _points(key: Tensor | None, batch: int, steps: int) -> Tensor:
    if key is None:
        raise ValueError("generate: drawing needs a key, came None; pass one, or temperature=0 for the likeliest")
    if not isinstance(key, Tensor):
        raise TypeError(f"generate: expected a key, as ft.random.key(0) makes it, came {type(key).__name__} {key!r}")
    keys = random.split(key, batch) if key.ndim == 1 else key
    if keys.shape != (batch, 2):
        raise ValueError(f"generate: expected a key (2,) or {batch} keys ({batch}, 2), came {tuple(key.shape)}")
    # all at once: an eager draw is some 120 operations, as many as a small model's step
    return torch.stack([random.uniform(k, (steps,), torch.float64) for k in keys.unbind()], -1)


def _draw(logits: Tensor, point: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Return the token at which the sorted, truncated distribution passes `point` of itself, (B,)."""
    ordered, tokens = torch.sort(logits, dim=-1, descending=True, stable=True)  # (B, V)
    ordered, tokens = ordered[:, :top_k], tokens[:, :top_k]
    upto = torch.cumsum(torch.softmax(ordered, -1), -1)  # (B, V)
    if top_p is not None:
        before = torch.nn.functional.pad(upto[:, :-1], (1, 0))
        kept = torch.sum(before < top_p, -1, keepdim=True)  # (B, 1), at least 1
        whole = torch.gather(upto, -1, kept - 1)  # (B, 1)
    else:
        whole = upto[:, -1:]  # (B, 1)
    passed = torch.sum(upto <= point[:, None] * whole, -1, keepdim=True)  # (B, 1)
    return torch.gather(tokens, -1, passed).squeeze(-1)
