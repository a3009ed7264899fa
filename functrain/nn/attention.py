"""Attention of queries to keys and values, fused or in plain operations.

B batch, H heads, T queries, S keys, K width of a head. The two functions compute the same and differ in what they can:

| | `fused_causal_attention` | `attention` |
|---|---|---|
| holds the (T, S) scores | no | yes |
| second derivatives, forward mode | as `attention` | yes |
| `torch.func.vmap` | lanes are rows of a batch | yes |
| other masks, dropout of the weights | no | yes |
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from functrain.compiler import engine
from functrain.nn.dropout import dropout
from functrain.nn.fused import fused_attention


def fused_causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let query t attend to keys 0 to t, by torch's fused kernel. Shapes: all (B, H, T, K).

    Equals `attention(q, k, v, causal_mask(T))`, and is it where transforms differentiate twice or in forward mode,
    which torch's kernel does not know.

    >>> q = k = torch.zeros(1, 1, 3, 1)  # all scores alike: a query takes the mean of what it sees
    >>> ft.nn.fused_causal_attention(q, k, torch.tensor([[[[0.0], [1.0], [3.0]]]])).flatten()
    tensor([0.0000, 0.5000, 1.3333])
    """
    if engine.twice():
        return attention(q, k, v, causal_mask(q.shape[-2], q.device))
    return fused_attention(q, k, v, is_causal=True)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, dropout_rate: float = 0.0, key: Tensor | None = None
) -> Tensor:
    """Return softmax(q @ k.T / sqrt(K)) @ v over the keys where `mask` is true, in plain operations.

    The softmax is in float32. With a key, `dropout_rate` of the softmax's weights are dropped.

    Shapes: q (B, H, T, K), k and v (B, H, S, K), mask (T, S) boolean or broadcastable to (B, H, T, S).
    Source: Vaswani et al. 2017 (arXiv:1706.03762), equation 1.

    >>> q, k, v = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 3, 2), torch.tensor([[[[0.0], [1.0], [5.0]]]])
    >>> ft.nn.attention(q, k, v, torch.tensor([[True, True, False]])).flatten()  # the third key is padding
    tensor([0.5000])
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, T, S)
    # added, not selected: the derivative of a sum costs no pass over the scores
    scores = scores + torch.where(mask, 0.0, -torch.inf).to(scores.dtype)
    weights = F.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32))  # (B, H, T, S)
    return dropout(weights, dropout_rate, key).to(v.dtype) @ v  # (B, H, T, K)


def causal_mask(queries: int, device: torch.device | str | None = None) -> Tensor:
    """Return the mask by which query t sees keys 0 to t, (T, T), boolean.

    >>> ft.nn.causal_mask(3)
    tensor([[ True, False, False],
            [ True,  True, False],
            [ True,  True,  True]])
    """
    return torch.ones(queries, queries, dtype=torch.bool, device=device).tril()
