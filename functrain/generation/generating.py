"""A model continues tokens, one after another, through a cache of keys and values.

B batch, T tokens of the prompt, V vocabulary.

A model is a module such as `functrain.models.gpt2`: it has `init_cache(config, batch, dtype, device)` and
`apply_cached(params, tokens, cache, config) -> (logits, cache)`, with `mask=` for rows that begin with padding, and its
config has a `context`. When the context is full, the cache starts anew from the last half of it, so a token is chosen
in view of at least half a context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from functrain import tree
from functrain.generation.choosing import Choose, check_prompt, chooser, count
from functrain.generation.ending import Ending, check_mask, ending
from functrain.progress import Progress, counter
from functrain.tree import Params


class Model(Protocol):
    """What generation needs of a model's module."""

    def init_cache(self, config: Any, batch: int, dtype: torch.dtype, device: Any) -> Any: ...

    def apply_cached(
        self, params: Params, tokens: Tensor, cache: Any, config: Any, *, mask: Tensor | None = None
    ) -> tuple[Tensor, Any]: ...


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
    mask: Tensor | None = None,
    end: int | Sequence[int] | None = None,
    padding: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Continue `tokens` (B, T) by `steps` tokens and return all of them, (B, T + steps).

    Each is drawn from softmax(logits / temperature), among the `top_k` likeliest tokens, and of these among the fewest
    that together have probability `top_p`. At temperature 0 it is the likeliest token, and no key is needed: equals
    choosing the largest of `model.apply`'s last logits each time, while the context suffices; so does `top_k=1`.

    Rows of different length begin with padding, and `mask` (B, T) is true where a token stands: while the context
    suffices for the longest, a row equals itself alone. A row ends with the token `end`, or any of several, and is
    filled up with `padding`, by default the first of these; where all rows have ended no further step is computed, for
    which each step is waited for.

    Row b draws from key b of `key` (B, 2), or of `split(key, B)`; a row with its key alone equals the row in its batch,
    and more steps begin with the same tokens. `progress` counts steps; on a GPU it runs ahead of the device, for which
    nothing waits before the end.

    Source: Fan et al. 2018 (arXiv:1805.04833) for top_k, Holtzman et al. 2020 (arXiv:1904.09751) for top_p.
    Raises: TypeError for a prompt that is no integer tensor, and for numbers of another kind; ValueError for an empty
    prompt, negative steps, a negative temperature, a top_k below 1, a top_p outside (0, 1], a key that is missing or of
    another shape, a mask of another shape or with padding after a token; IndexError for a token outside of the
    vocabulary on the CPU; FloatingPointError for logits that are NaN.

    >>> config = ft.models.gpt2.Config(vocab=256, context=16, layers=1, heads=1, width=8)
    >>> params, prompt = ft.models.gpt2.init(config, ft.random.key(0)), torch.tensor([[1, 2]])
    >>> tokens = ft.generation.generate(ft.models.gpt2, params, prompt, config, ft.random.key(1), steps=5, top_k=50)
    >>> tokens.shape, tokens[:, :2].tolist()
    (torch.Size([1, 7]), [[1, 2]])
    """
    check_prompt(tokens)
    steps = count("steps", steps, 0, "")
    choose = chooser(tokens.shape[0], key, steps, temperature, top_k, top_p)
    ends = ending(end, padding)
    mask = check_mask(mask, tokens)
    add = counter(steps, progress)
    made, broken = [tokens], torch.zeros((), dtype=torch.bool, device=tokens.device)
    for chosen, is_broken in _extend(model, params, tokens, mask, config, steps, choose, ends):
        made.append(chosen[:, None])
        broken = broken | is_broken
        add(1)
    if ends is not None and (left := steps + 1 - len(made)):
        made.append(tokens.new_full((tokens.shape[0], left), ends.padding))
        add(left)
    if broken:
        raise _not_a_number()
    return torch.cat(made, 1)


def stream(
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
    mask: Tensor | None = None,
    end: int | Sequence[int] | None = None,
    padding: int | None = None,
) -> Iterator[Tensor]:
    """Continue `tokens` (B, T) by up to `steps` tokens, and give those of each step, (B,), as soon as they are chosen.

    Equals the new tokens of `generate` with the same arguments, one column after another, up to the one in which the
    last row ends. Whoever has read enough stops reading, and no further step is computed. Each step is waited for, as a
    NaN among its logits is an error at once.

    Raises: as `generate` does, at the call and not at the first token; FloatingPointError at the token that is drawn
    from NaN.

    >>> config = ft.models.gpt2.Config(vocab=256, context=16, layers=1, heads=1, width=8)
    >>> params, prompt = ft.models.gpt2.init(config, ft.random.key(0)), torch.tensor([[1, 2]])
    >>> tokens = ft.generation.stream(ft.models.gpt2, params, prompt, config, ft.random.key(1), steps=100)
    >>> next(tokens).shape  # the first one, of each row of the prompt; no further step is computed yet
    torch.Size([1])
    """
    check_prompt(tokens)
    steps = count("steps", steps, 0, "")
    choose = chooser(tokens.shape[0], key, steps, temperature, top_k, top_p)
    ends, mask = ending(end, padding), check_mask(mask, tokens)
    return _checked(_extend(model, params, tokens, mask, config, steps, choose, ends))


def _checked(found: Iterator[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    for chosen, is_broken in found:
        if is_broken:
            raise _not_a_number()
        yield chosen


def _not_a_number() -> FloatingPointError:
    return FloatingPointError("generate: the model's logits are NaN; look for a parameter that is not finite")


@torch.no_grad()
def _extend(
    model: Model,
    params: Params,
    tokens: Tensor,
    mask: Tensor | None,
    config: Any,
    steps: int,
    choose: Choose,
    ends: Ending | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Give the tokens of each step, (B,), and whether its logits are NaN, ()."""
    dtype = tree.leaves(params)[0].dtype
    cache, room = None, 0  # room: tokens that the cache can still read
    seen, real = tokens[:, -config.context :], None if mask is None else mask[:, -config.context :]
    unread = seen
    ended = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    for step in range(steps):
        begins = cache is None or unread.shape[1] > room
        if begins:
            if cache is not None:
                unread = seen[:, -max(config.context // 2, 1) :]
            cache, room = model.init_cache(config, tokens.shape[0], dtype, tokens.device), config.context
        if begins and real is not None:
            now: Any = model.apply_cached(params, unread, cache, config, mask=real[:, -unread.shape[1] :])
        else:
            now = model.apply_cached(params, unread, cache, config)
        logits, cache = now  # (B, unread, V)
        room -= unread.shape[1]
        chosen = choose(logits[:, -1], step).to(tokens.dtype)  # (B,)
        if ends is not None:
            chosen = torch.where(ended, ends.padding, chosen)
            ended = ended | ends.is_end(chosen)
        unread = chosen[:, None]  # (B, 1)
        seen = torch.cat([seen, unread], 1)[:, -config.context :]  # (B, up to the context)
        if real is not None:
            real = torch.cat([real, torch.ones_like(unread, dtype=torch.bool)], 1)[:, -config.context :]
        yield chosen, logits[:, -1].isnan().any()
        if ends is not None and ended.all():
            return
