"""Some places of each row alone, of which a head computes its logits. B batch, T tokens, K places, D width."""

from __future__ import annotations

import torch
from torch import Tensor


def at_places(model: str, x: Tensor, places: Tensor | None, has_tokens: bool) -> Tensor:
    """Return x (B, T, D) at the places (B, K) of each row, (B, K, D), or x itself without places.

    Raises: ValueError for places that are not (B, K), and for a head without logits of tokens; TypeError unless they
    are int64; IndexError, on the CPU, for a place outside of the row.
    """
    if places is None:
        return x
    if not has_tokens:
        raise ValueError(f"{model}: expected no places with a head that has no logits of tokens, came {_came(places)}")
    if places.dtype != torch.int64:
        raise TypeError(f"{model}: expected int64 places, came {_came(places)}; pass the leaf of ft.data.masked")
    if places.dim() != 2 or places.shape[0] != x.shape[0]:
        raise ValueError(
            f"{model}: expected places (B, K) with B = {x.shape[0]} as the tokens, came {_came(places)}; they are "
            "numbers of columns, the leaf of ft.data.masked"
        )
    try:
        # torch.take_along_dim takes a place outside for one inside
        return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
    except (IndexError, RuntimeError) as error:
        if "out of bounds" not in str(error):
            raise
        raise IndexError(f"{model}: expected places in [0, {x.shape[1]}), the tokens of a row; {error}") from error


def _came(places: Tensor) -> str:
    return f"{tuple(places.shape)} of {places.dtype}"
