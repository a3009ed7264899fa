"""What a layer of the Llama family computes before and after its attention.

B batch, T tokens, D width, H heads, G heads of keys and values, K width of a head, F inner width.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from functrain import losses, nn
from functrain.models.llama_config import Config
from functrain.tree import Params


def heads(params: Params, x: Tensor, cos: Tensor, sin: Tensor, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries (B, H, T, K) and keys, turned, and values (B, G, T, K) of a layer."""
    attn, each = params["attn"], config.width_of_head
    h = nn.rms_norm(x, **params["norm_1"], eps=config.eps)
    q, k, v = (rearrange(nn.linear(h, **attn[name]), "b t (h k) -> b h t k", k=each) for name in "qkv")
    if config.qk_norm:
        q, k = (nn.rms_norm(y, **attn[name], eps=config.eps) for y, name in ((q, "q_norm"), (k, "k_norm")))
    return nn.rotate(q, cos, sin), nn.rotate(k, cos, sin), v


def add(params: Params, x: Tensor, attended: Tensor, config: Config, load: Any, real: Tensor | None) -> Any:
    """Add what was attended to and what the MLP, or the experts, make of it; and the experts' load to `load`."""
    x = x + nn.linear(rearrange(attended, "b h t k -> b t (h k)"), **params["attn"]["out"])  # (B, T, D)
    h = nn.rms_norm(x, **params["norm_2"], eps=config.eps)
    if "experts" in params:
        per_token, normalized = config.experts_per_token, config.experts_normalized
        y, more = nn.experts(h, **params["experts"], per_token=per_token, normalized=normalized, mask=real)
        if load is not None:
            load = losses.ExpertLoad(*[a + b for a, b in zip(load, more, strict=True)])
        return x + y, load
    mlp = params["mlp"]
    inside = nn.swiglu(nn.linear(h, **mlp["gate"]), nn.linear(h, **mlp["up"]))  # (B, T, F)
    return x + nn.linear(inside, **mlp["down"]), load


def positions_of(tokens: Tensor, documents: Tensor | None, mask: Tensor | None) -> Tensor:
    """Count tokens from the beginning of each document, (B, T), or past the padding of each row; of plain rows (T,)."""
    places = torch.arange(tokens.shape[1], device=tokens.device)
    if mask is not None and documents is None:
        return (torch.cumsum(mask.long(), 1) - 1).clamp(min=0)
    if documents is None:
        return places  # as all rows have it
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins = torch.cat([begins[:, :1], documents[:, 1:] != documents[:, :-1]], 1)  # (B, T)
    return places - torch.cummax(torch.where(begins, places, 0), 1).values
