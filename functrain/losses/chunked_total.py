"""The total of a cross entropy over chunks of rows, with its gradients made beside it.

N rows, C rows of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from functrain.losses.cross_entropy import gathered, wide


def total_of_chunks(hidden: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor, chunk: int) -> Tensor:
    """Return the sum of weighted cross entropies, (). Shapes: (N, D), (V, D), (N,), (N,)."""
    need_h, need_e, need_w = (torch.is_grad_enabled() and _differentiated(x) for x in (hidden, embedding, weights))
    if need_h or need_e or need_w:
        return _ChunkedTotal.apply(hidden, embedding, targets, weights, chunk, need_h, need_e)[0]
    rows = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return torch.sum(torch.cat([_losses(_log_probabilities(h, embedding), t) for h, t in rows]) * weights)


def _log_probabilities(hidden: Tensor, embedding: Tensor) -> Tensor:
    """Return the log-softmax of the logits of C rows, (V, C).

    A column for each token: 10 % faster on a CPU than a row, because the long matrix products of the gradient take the
    embedding and the residuals as they lie in memory.
    """
    return F.log_softmax(wide(embedding @ hidden.mT), 0)


def _losses(logp: Tensor, targets: Tensor) -> Tensor:
    return -gathered("next_token_from_hidden", logp, targets, "by mask=", dim=0)  # (C,)


def _differentiated(x: Tensor) -> bool:
    # private: a tensor of torch.func.vmap does not say that the one it wraps is differentiated; guarded by a test
    while not x.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x.requires_grad


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Return total + a @ b in float32 or wider."""
    if total is None:
        return wide(a @ b)
    # the addition within the product, where there is such a product: one pass less over a whole gradient
    return torch.addmm(total, a, b) if total.dtype == a.dtype else total + wide(a @ b)


class _ChunkedTotal(torch.autograd.Function):
    """Sum of weighted cross entropies, with its gradients as further outputs.

    The backward only scales them. Because they are outputs they have derivatives themselves: a second derivative sends
    them cotangents, and these meet the Hessian in plain operations that any further derivative can go through.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        hidden: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor, chunk: int, need_h: bool, need_e: bool
    ) -> tuple[Tensor | None, ...]:
        losses: list[Tensor] = []
        grad_h: list[Tensor] = []
        grad_e: Tensor | None = None
        for h, t, w in zip(hidden.split(chunk), targets.split(chunk), weights.split(chunk), strict=True):
            logp = _log_probabilities(h, embedding)  # (V, C)
            losses.append(_losses(logp, t))  # (C,)
            residual = torch.scatter_add(torch.exp(logp) * w, 0, t[None], -w[None]).to(h.dtype)  # (V, C)
            if need_h:
                grad_h.append(residual.mT @ embedding)  # (C, D)
            if need_e:
                # float32: a bfloat16 sum over many chunks would lose the later ones
                grad_e = _add_product(grad_e, residual, h)  # (V, D)
        each = torch.cat(losses)  # (N,)
        total = torch.sum(each * weights)
        return total, each, torch.cat(grad_h) if need_h else None, None if grad_e is None else grad_e.to(h.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.chunk = inputs[4]
        # the same list twice, because the generated vmap rule remembers the batch dimensions of one list only
        ctx.save_for_backward(*inputs[:4], *output[1:])
        ctx.save_for_forward(*inputs[:4], *output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, scale: Tensor | None, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, embedding, targets, weights, each, grad_h, grad_e = ctx.saved_tensors
        along_w, along_h, along_e = cotangents
        # the Hessian is symmetric: cotangents of the gradients are a direction of the inputs
        direction = (along_h, along_e, along_w)
        second = _hessian_product(hidden, embedding, targets, weights, ctx.chunk, direction)
        first = [None if g is None or scale is None else g * scale for g in (grad_h, grad_e, each)]
        h, e, w = (b if a is None else a if b is None else a + b for a, b in zip(first, second, strict=True))
        return h, e, None, w, None, None, None

    @staticmethod
    def jvp(ctx: Any, dh: Tensor | None, de: Tensor | None, _: None, dw: Tensor | None, *rest: None) -> Any:
        hidden, embedding, targets, weights, each, _, _ = ctx.saved_tensors
        d_grad_h, d_grad_e, d_each = _hessian_product(hidden, embedding, targets, weights, ctx.chunk, (dh, de, dw))
        total = torch.sum(d_each * weights) + (0.0 if dw is None else torch.sum(each * dw))
        return total, d_each, d_grad_h, d_grad_e


def _residual(probabilities: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The gradient of the weighted losses by the logits, (C, V)."""
    return torch.scatter_add(probabilities * weights[:, None], -1, targets[:, None], -weights[:, None])


def _hessian_product(
    hidden: Tensor,
    embedding: Tensor,
    targets: Tensor,
    weights: Tensor,
    chunk: int,
    direction: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> tuple[Any, Any, Any]:
    """Derivatives of (grad_h, grad_e, losses) along a direction of (hidden, embedding, weights); None along nothing."""
    if all(d is None for d in direction):
        return None, None, None
    pairs = zip((hidden, embedding, weights), direction, strict=True)
    dh, de, dw = (torch.zeros_like(x) if d is None else d for x, d in pairs)
    d_grad_h, d_losses, d_grad_e = [], [], torch.zeros_like(wide(embedding))
    for h, t, w, dh_c, dw_c in zip(*(x.split(chunk) for x in (hidden, targets, weights, dh, dw)), strict=True):
        p = F.softmax(wide(h @ embedding.mT), -1)  # (C, V)
        dz = wide(dh_c @ embedding.mT + h @ de.mT)  # (C, V)
        mean = torch.sum(p * dz, -1, keepdim=True)  # (C, 1)
        residual = _residual(p, t, w).to(h.dtype)  # (C, V)
        d_residual = (_residual(p, t, dw_c) + p * (dz - mean) * w[:, None]).to(h.dtype)  # (C, V)
        d_grad_h.append(d_residual @ embedding + residual @ de)  # (C, D)
        d_grad_e = d_grad_e + wide(d_residual.mT @ h + residual.mT @ dh_c)  # (V, D)
        d_losses.append((mean - dz.gather(-1, t[:, None])).squeeze(-1))  # (C,)
    return torch.cat(d_grad_h), d_grad_e.to(embedding.dtype), torch.cat(d_losses)
