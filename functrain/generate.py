"""Text from a language model, token by token, through a cache of keys and values.

B batch, T tokens of the prompt, V vocabulary.

A model is a module such as `functrain.models.gpt2`: it has `init_cache(config, batch, dtype, device)` and
`apply_cached(params, tokens, cache, config) -> (logits, cache)`, and its config has a `context`. When the context is
full, the cache starts anew from the last half of it, so a token is chosen in view of at least half a context.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from operator import index
from typing import Any, Protocol

import torch
from torch import Tensor

from functrain import random, tree
from functrain.tree import Params


class Model(Protocol):
    """What generation needs of a model's module."""

    def init_cache(self, config: Any, batch: int, dtype: torch.dtype, device: Any) -> Any: ...

    def apply_cached(self, params: Params, tokens: Tensor, cache: Any, config: Any) -> tuple[Tensor, Any]: ...


def generate(
    model: Model,
    params: Params,
    tokens: Tensor,
    config: Any,
    key: Tensor | None = None,
    *,
    steps: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Continue `tokens` (B, T) by `steps` tokens and return all of them, (B, T + steps).

    Each is drawn from softmax(logits / temperature), among the `top_k` likeliest tokens, and of these among the fewest
    that together have probability `top_p`. At temperature 0 it is the likeliest token, and no key is needed: equals
    choosing the largest of `model.apply`'s last logits each time, while the context suffices; so does `top_k=1`.

    Row b draws from key b of `key` (B, 2), or of `split(key, B)`; a row with its key alone equals the row in its batch,
    and more steps begin with the same tokens.

    Source: Fan et al. 2018 (arXiv:1805.04833) for top_k, Holtzman et al. 2020 (arXiv:1904.09751) for top_p.
    Raises: TypeError for a prompt that is no integer tensor, and for numbers of another kind; ValueError for an empty
    prompt, negative steps, a negative temperature, a top_k below 1, a top_p outside (0, 1], a key that is missing or of
    another shape; IndexError for a token outside of the vocabulary on the CPU; FloatingPointError for logits that are
    NaN.
    """
    _check_prompt(tokens)
    steps = _count("steps", steps, 0, "")
    top_k = None if top_k is None else _count("top_k", top_k, 1, "; None draws among all tokens")
    for name, value in (("temperature", temperature), ("top_p", 1.0 if top_p is None else top_p)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"generate: expected {name} to be a number, came {type(value).__name__} {value!r}")
    if not temperature >= 0.0:
        raise ValueError(f"generate: expected a temperature of at least 0, came {temperature}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"generate: expected top_p in (0, 1], came {top_p}; None draws among all tokens")
    if temperature == 0.0:
        return _extend(model, params, tokens, config, steps, lambda logits, step: torch.argmax(logits, -1))
    points = _points(key, tokens.shape[0], steps)  # (steps, B)

    def choose(logits: Tensor, step: int) -> Tensor:
        return _draw(logits.double() / temperature, points[step], top_k, top_p)

    return _extend(model, params, tokens, config, steps, choose)


def _check_prompt(tokens: Any) -> None:
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


def _count(name: str, value: Any, least: int, way_out: str) -> int:
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


@torch.no_grad()
def _extend(
    model: Model, params: Params, tokens: Tensor, config: Any, steps: int, choose: Callable[[Tensor, int], Tensor]
) -> Tensor:
    dtype = tree.leaves(params)[0].dtype
    cache, room = None, 0  # room: tokens that the cache can still read
    unread = tokens[:, -config.context :]
    broken = torch.zeros((), dtype=torch.bool, device=tokens.device)
    for step in range(steps):
        if cache is None or unread.shape[1] > room:
            if cache is not None:
                unread = tokens[:, -max(config.context // 2, 1) :]
            cache, room = model.init_cache(config, tokens.shape[0], dtype, tokens.device), config.context
        logits, cache = model.apply_cached(params, unread, cache, config)  # (B, unread, V)
        room -= unread.shape[1]
        broken = broken | logits[:, -1].isnan().any()
        unread = choose(logits[:, -1], step)[:, None].to(tokens.dtype)  # (B, 1)
        tokens = torch.cat([tokens, unread], 1)  # (B, T + step + 1)
    if broken:
        raise FloatingPointError("generate: the model's logits are NaN; look for a parameter that is not finite")
    return tokens
