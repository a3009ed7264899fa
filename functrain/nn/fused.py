"""torch's fused attention under maps, of which torch itself has a loop over the lanes, and a warning.

L lanes of a map, B batch, H heads, T queries, S keys, K width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from functrain.compiler import engine

Tensors = Sequence[Tensor | None]


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """Return `F.scaled_dot_product_attention(q, k, v, mask, **options)`; lanes of a map are rows of its batch.

    It has first derivatives in reverse. Under a map the backward pass runs the forward kernel once more.
    """
    if torch.compiler.is_dynamo_compiling() or not engine.mapped():
        return F.scaled_dot_product_attention(q, k, v, mask, **options)
    return cast(Tensor, _Attention.apply(options, 0, q, k, v, mask))


class _Attention(torch.autograd.Function):
    """Of tensors whose first `lanes` dimensions are those of maps."""

    @staticmethod
    def forward(options: dict[str, Any], lanes: int, *tensors: Tensor | None) -> Tensor:
        return _attend(options, lanes, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.options, ctx.lanes, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        found = _Gradient.apply(ctx.options, ctx.lanes, wanted, grad, *ctx.saved_tensors)
        grads = dict(zip(wanted, found, strict=True))
        return None, None, *[grads.get(i) for i in range(4)]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], options: Any, lanes: int, *tensors: Tensor | None) -> tuple[Any, int]:
        return _Attention.apply(options, lanes + 1, *_lanes_first(tensors, in_dims[2:])), 0


class _Gradient(torch.autograd.Function):
    """Of attention, in those of the tensors that are `wanted`."""

    @staticmethod
    def forward(options: dict[str, Any], lanes: int, wanted: list[int], grad: Tensor, *tensors: Any) -> tuple[Any, ...]:
        inputs: list[Any] = list(tensors)
        for i, t in enumerate(tensors):
            inputs[i] = None if t is None else engine.start_of_gradient(t, i in wanted)
        with torch.enable_grad():
            found = _attend(options, lanes, inputs)
        return torch.autograd.grad(found, [inputs[i] for i in wanted], grad.expand_as(found))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None: ...

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            "fused attention: torch's kernel has no second derivative; differentiate by transforms of functrain or of "
            "torch.func, which take the formula in its place, or pass implementation='math' to functrain.nn.attention"
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], options: Any, lanes: int, wanted: list[int], *tensors: Tensor | None
    ) -> tuple[Any, Any]:
        grad, *moved = _lanes_first(tensors, in_dims[3:])
        for i in wanted:
            if in_dims[4 + i] is None:  # what all lanes share has a gradient of each
                moved[i] = moved[i].expand(info.batch_size, *moved[i].shape[1:])
        return _Gradient.apply(options, lanes + 1, wanted, grad, *moved), (0,) * len(wanted)


def _lanes_first(tensors: Tensors, dims: Sequence[int | None]) -> list[Any]:
    """Move the lanes to the front; what all lanes share has 1 there."""
    return [
        t if t is None else t.unsqueeze(0) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(tensors, dims, strict=True)
    ]


def _attend(options: dict[str, Any], lanes: int, tensors: Tensors) -> Tensor:
    q, k, v, mask = cast(list[Tensor], tensors)
    if lanes == 0:
        return F.scaled_dot_product_attention(q, k, v, mask, **options)
    batched = q.dim() - lanes > 3  # (L, ..., B, H, T, K), and else (L, ..., H, T, K) or (L, ..., T, K)
    front = lanes + batched
    fronts = [x.shape[:front] for x in (q, k, v)]
    if mask is not None:
        missing = q.dim() - mask.dim()  # dimensions that a mask of (T, S), say, broadcasts over
        mask = mask.reshape(*mask.shape[:lanes], *[1] * missing, *mask.shape[lanes:])
        fronts.append(mask.shape[:front])
    sizes = torch.broadcast_shapes(*fronts)
    if mask is not None:
        shared = all(size == 1 for size in mask.shape[:front])
        mask = mask.flatten(0, front - 1) if shared else _rows(mask, sizes)
    q, k, v = (_rows(x, sizes) for x in (q, k, v))
    found = F.scaled_dot_product_attention(q, k, v, mask, **options)
    return found.unflatten(0, sizes)


def _rows(x: Tensor, sizes: Sequence[int]) -> Tensor:
    return x.expand(*sizes, *x.shape[len(sizes) :]).flatten(0, len(sizes) - 1)
