"""Attention within the documents of packed rows, one document after another.

B batch, H heads, T tokens, K width of a head.

By a mask torch's kernel computes the scores of all pairs in a row: of n documents of one length n times as many as are
seen. How long documents are is known when a program runs, so this is an operation of ours, which a trace does not look
into.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from functrain.nn.attention_masks import attention_mask
from functrain.transforms.tape import DOTS

aten = torch.ops.aten
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_SHORTEST = 8  # tokens, the mean of a batch: of documents of 4 the calls take as long as a mask


def goes_by_documents(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> bool:
    """Tell whether `attention_by_documents` takes these tensors: those on a CPU, for which torch's kernel is."""
    if torch.compiler.is_dynamo_compiling() or not torch.backends.cuda.flash_sdp_enabled():  # the CPU's, too
        return False
    one = q.dtype == k.dtype == v.dtype and q.shape[-1] == v.shape[-1] and q.shape[:-3] == k.shape[:-3]
    rows = q.dim() == 4 and documents.shape[0] in (1, q.shape[0])
    return q.device.type == "cpu" and one and rows and q.dtype in _FLOATS and q.numel() > 0


def attention_by_documents(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor, *, causal: bool, scale: float | None
) -> Tensor:
    """Return what `attention` does of these arguments. It has first derivatives in reverse, and maps."""
    if q.shape[1] != k.shape[1]:
        k, v = (torch.repeat_interleave(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
    of_rows = documents.expand(q.shape[0], -1)  # (B, T)
    return cast(Tensor, _Attention.apply(q, k, v, of_rows, causal, scale)[0])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return cast(tuple[Tensor, Tensor], torch.ops.functrain.scaled_dot_product_of_documents(*inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.causal, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        return *_Gradient.apply(grad, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None, None

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        *tensors, causal, scale = inputs
        found = _Attention.apply(*_rows(info.batch_size, dims, tensors), causal, scale)
        return tuple([x.unflatten(0, (info.batch_size, -1)) for x in found]), (0, 0)


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return cast(tuple[Tensor, ...], torch.ops.functrain.scaled_dot_product_of_documents_backward(*inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None: ...

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            "fused attention: torch's kernel has no second derivative; differentiate by transforms of functrain or of "
            "torch.func, which take the formula in its place, or pass implementation='math' to functrain.nn.attention"
        )

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        *tensors, causal, scale = inputs
        found = _Gradient.apply(*_rows(info.batch_size, dims, tensors), causal, scale)
        return tuple([x.unflatten(0, (info.batch_size, -1)) for x in found]), (0, 0, 0)


def _rows(lanes: int, dims: tuple[Any, ...], tensors: list[Tensor]) -> list[Tensor]:
    """Put the lanes of a map one after another, as rows of a batch."""
    moved = [
        t.expand(lanes, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(tensors, dims[: len(tensors)], strict=True)
    ]
    return [t.flatten(0, 1) for t in moved]


# ---- the operations, opaque to a trace ------------------------------------------------------------------------------


def _attend(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Return what is attended to (B, H, T, K), and the logarithm of each softmax's sum (B, H, T)."""
    q, k, v = (_lined_up(x) for x in (q, k, v))
    kernel = aten._scaled_dot_product_flash_attention_for_cpu
    seen, sums = _made(q), _sums(q)
    places = _places(documents)
    if places is None:
        mask = _mask(documents, causal, q.dtype)
        found, logs = kernel(q, k, v, attn_mask=mask, scale=scale)
        return seen.copy_(found), sums.copy_(logs)
    for at in places:
        seen[at], sums[at] = kernel(q[at], k[at], v[at], is_causal=causal, scale=scale)
    return seen, sums


def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor,
    seen: Tensor,
    sums: Tensor,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v = (_lined_up(x) for x in (grad, q, k, v))
    kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward
    grads = _made(q), _made(q), _made(q)
    places = _places(documents)
    if places is None:
        mask = _mask(documents, causal, q.dtype)
        found = kernel(grad, q, k, v, seen, sums, 0.0, False, attn_mask=mask, scale=scale)
        return tuple([made.copy_(x) for made, x in zip(grads, found, strict=True)])  # type: ignore[return-value]
    for at in places:
        given = (x[at] for x in (grad, q, k, v, seen, sums))
        for made, x in zip(grads, kernel(*given, 0.0, causal, scale=scale), strict=True):
            made[at] = x
    return grads


def _places(documents: Tensor) -> list[tuple[slice, slice, slice]] | None:
    """Return where each document lies in a (B, H, T); None for a mask, where one lies in pieces or they are short."""
    tokens = documents.shape[1]
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = begins.flatten().nonzero().flatten()
    starts, numbers = first.tolist(), documents.flatten()[first].tolist()
    pieces = {(start // tokens, number) for start, number in zip(starts, numbers, strict=True)}
    if len(pieces) < len(starts) or len(starts) * _SHORTEST > documents.numel():
        return None
    stops = [*starts[1:], documents.numel()]
    found = []
    for start, stop in zip(starts, stops, strict=True):
        row = start // tokens
        found.append((slice(row, row + 1), slice(None), slice(start - row * tokens, stop - row * tokens)))
    return found


def _mask(documents: Tensor, causal: bool, dtype: torch.dtype) -> Tensor:
    mask = attention_mask(documents.shape[1], causal=causal, documents=documents)  # (B, 1, T, T)
    return torch.where(mask, 0.0, -torch.inf).to(dtype)


def _lined_up(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _made(q: Tensor) -> Tensor:
    """Make what the kernel makes, in its layout: the heads of a token are neighbours."""
    batch, heads, tokens, width = q.shape
    return q.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _sums(q: Tensor) -> Tensor:
    batch, heads, tokens, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(batch, tokens, heads, dtype=dtype).transpose(1, 2)


_library = torch.library.Library("functrain", "FRAGMENT")
_library.define(
    "scaled_dot_product_of_documents(Tensor q, Tensor k, Tensor v, Tensor documents, bool causal, float? scale) -> "
    "(Tensor, Tensor)"
)
_library.define(
    "scaled_dot_product_of_documents_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor documents, "
    "Tensor seen, Tensor sums, bool causal, float? scale) -> (Tensor, Tensor, Tensor)"
)
_library.impl("scaled_dot_product_of_documents", _attend, "CompositeExplicitAutograd")
_library.impl("scaled_dot_product_of_documents_backward", _attend_backward, "CompositeExplicitAutograd")
torch.library.register_fake(
    "functrain::scaled_dot_product_of_documents", lambda q, *others: (_made(q), _sums(q)), lib=_library
)
torch.library.register_fake(
    "functrain::scaled_dot_product_of_documents_backward",
    lambda grad, q, *others: (_made(q), _made(q), _made(q)),
    lib=_library,
)
DOTS.add(torch.ops.functrain.scaled_dot_product_of_documents.default)
