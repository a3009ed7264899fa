"""Attention of queries to keys and values: one function, by torch's fused kernel or by its formula.

B batch, H heads, G heads of keys and values, T queries, S keys, K width of a head.

| | `implementation="fused"` | `implementation="math"` |
|---|---|---|
| holds the (T, S) scores | no | yes |
| second derivatives, forward mode, dropout of the weights | by the formula | yes |
| `torch.func.vmap` | lanes are rows of a batch | yes |
| softmax | the kernel's | in float32 at least |
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from functrain.compiler import engine
from functrain.nn.attention_masks import attention_mask, check_mask
from functrain.nn.documents import attention_by_documents, goes_by_documents
from functrain.nn.dropout import dropout
from functrain.nn.fused import fused_attention
from functrain.sharding.split import check_all


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    documents: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    key: Tensor | None = None,
    heads: int | None = None,
    implementation: Literal["fused", "math"] = "fused",
) -> Tensor:
    """Return softmax(scale * q @ k.T) @ v over the keys that a query sees, (B, H, T, K).

    It sees those that all of these let it see: `mask`, boolean and true where it does; `causal`, those up to its own
    place; `window`, those less than so many places away; `documents`, those whose number is its own, for several
    documents in a row; `key_mask`, true where a key is no padding. A query that sees nothing has zeros, and gradients
    of zero. The scale is 1 / sqrt(K) unless given. With fewer heads G of keys, each serves H / G heads of queries in
    turn (grouped and multi-query attention). With a key, `dropout_rate` of the softmax's weights are dropped: where a
    plan splits heads, those that one process would drop, told how many `heads` there are in all.

    "fused" is torch's kernel, which never holds the scores, and the formula where that has none: where transforms
    differentiate twice or in forward mode, and where weights are dropped. "math" is always the formula, which is on a
    CPU the faster one for short contexts. On a CPU "fused" goes through `documents` one by one, if there is no window,
    mask or key_mask beside them. Else the layers of a model share a mask: make it once, by `attention_mask`.

    Shapes: q (B, H, T, K), k and v (B, G, S, K); mask (T, S) or broadcastable to (B, H, T, S); documents (B, T), any
    integers; key_mask (B, S). T is S wherever places are compared: with causal, window and documents.
    Raises: ValueError for heads that do not divide, and for shapes that do not fit; TypeError for a mask that is not
    boolean.
    Source: Vaswani et al. 2017 (arXiv:1706.03762), equation 1; Ainslie et al. 2023 (arXiv:2305.13245) for groups;
    Beltagy et al. 2020 (arXiv:2004.05150) for windows.

    >>> q = k = torch.zeros(1, 1, 3, 1)  # all scores alike: a query takes the mean of what it sees
    >>> v = torch.tensor([[[[0.0], [1.0], [3.0]]]])
    >>> ft.nn.attention(q, k, v, causal=True).flatten()
    tensor([0.0000, 0.5000, 1.3333])
    >>> ft.nn.attention(q, k, v, documents=torch.tensor([[0, 0, 1]])).flatten()  # two documents in a row
    tensor([0.5000, 0.5000, 3.0000])
    >>> ft.nn.attention(q, k, v, key_mask=torch.tensor([[True, True, False]])).flatten()  # the third is padding
    tensor([0.5000, 0.5000, 0.5000])
    """
    _check(q, k, v, mask, implementation)
    check_all(q.shape[-2])
    tokens = q.shape[-2]
    window = None if window is not None and window >= tokens else window  # nothing is so far away
    compared = causal or window is not None or documents is not None
    if compared and k.shape[-2] != tokens:
        raise ValueError(
            f"attention: expected as many keys as queries where places are compared, came {tokens} queries and "
            f"{k.shape[-2]} keys; say by mask= which keys a query sees"
        )
    plain = mask is None and window is None and key_mask is None
    dropped = key is not None and dropout_rate > 0.0
    by_formula = implementation == "math" or dropped or engine.twice()
    if documents is not None and plain and not by_formula:
        check_mask(tokens, documents=documents)
        if goes_by_documents(q, k, v, documents):
            return attention_by_documents(q, k, v, documents, causal=causal, scale=scale)
    alone = causal and plain and documents is None
    if not alone and (compared or key_mask is not None):
        made = attention_mask(
            tokens, causal=causal, window=window, documents=documents, key_mask=key_mask, device=q.device
        )
        mask = made if mask is None else mask & made
    if by_formula:
        if alone:
            mask = attention_mask(tokens, causal=True, device=q.device)
        return _formula(q, k, v, mask, alone, scale, dropout_rate, key, heads)
    options: dict[str, Any] = {"is_causal": alone} | ({} if scale is None else {"scale": scale})
    if q.dim() > 2 and q.shape[-3] != k.shape[-3]:
        options["enable_gqa"] = True
    return fused_attention(q, k, v, mask, **options)


def _formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seeing: bool,
    scale: float | None,
    dropout_rate: float,
    key: Tensor | None,
    heads: int | None,
) -> Tensor:
    """Compute attention in plain operations; where all queries are `seeing`, each sees a key."""
    if q.dim() > 2 and q.shape[-3] != k.shape[-3]:
        k, v = (torch.repeat_interleave(x, q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.mT  # (B, H, T, S)
    sees = None
    if mask is not None:
        if not seeing:
            # a softmax of nothing is NaN, and so is its derivative, whatever is taken in its place afterwards
            sees = mask.any(-1, keepdim=True)  # (..., T, 1)
            mask = mask | ~sees
        # added, not selected: the derivative of a sum costs no pass over the scores
        scores = scores + torch.where(mask, 0.0, -torch.inf).to(scores.dtype)
    weights = F.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32))  # (B, H, T, S)
    seen = (
        dropout(weights, dropout_rate, key, whole=None if heads is None else (1, heads)).to(v.dtype) @ v
    )  # (B, H, T, K)
    return seen if sees is None else torch.where(sees, seen, 0.0)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, implementation: str) -> None:
    if implementation not in ("fused", "math"):
        raise ValueError(f"attention: expected implementation 'fused' or 'math', came {implementation!r}")
    came = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() >= 2 or q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise ValueError(f"attention: expected q (B, H, T, K), k and v (B, G, S, K), came {came}; see `attention`")
    if q.dim() > 2 and (k.shape[-3] != v.shape[-3] or q.shape[-3] % max(k.shape[-3], 1)):
        raise ValueError(
            f"attention: expected heads of q to be a multiple of those of k and v, came {came}; choose some that divide"
        )
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(
            f"attention: expected a boolean mask, true where a query sees a key, came {mask.dtype}; pass mask.bool()"
        )
    wanted = (*q.shape[:-1], k.shape[-2])
    trailing = zip(reversed(mask.shape), reversed(wanted), strict=False)
    if mask.dim() > len(wanted) or any(size not in (1, needed) for size, needed in trailing):
        raise ValueError(
            f"attention: expected a mask broadcastable to (B, H, T, S) = {wanted}, came {tuple(mask.shape)}; padding "
            "of keys (B, S) is key_mask="
        )
