"""Products of neighbouring rows with a matrix a group: what experts are made of.

N rows, sorted by group; E groups, of which group e has the rows up to `ends[e]`; D inputs, F outputs.

torch's `grouped_mm` refuses rows that are no multiple of 16 bytes and float64, has no rule for maps but a loop with a
warning, and in a trace, of shapes alone, takes nothing but bfloat16. So it is called inside of an operation of ours.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from functrain.transforms.tape import DOTS


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Return each row of x (N, D) times the matrix of its group, weight (E, D, F): (N, F).

    It has derivatives in reverse of any order, and maps; none in forward mode. ends (E,), int32, grows to N.
    """
    return cast(Tensor, _Product.apply(x, weight, ends))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.functrain.grouped_product(x, weight, ends))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, ends = ctx.saved_tensors
        of_x = _Product.apply(grad, weight.mT, ends) if ctx.needs_input_grad[0] else None
        of_weight = _Outer.apply(x, grad, ends) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, None

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, int]:
        rows, weights, all_ends = _lanes(info.batch_size, dims, x, weight, ends)
        return _Product.apply(rows, weights, all_ends).unflatten(0, (info.batch_size, -1)), 0


class _Outer(torch.autograd.Function):
    """For each group the sum of the outer products of its rows: x (N, D), y (N, F) to (E, D, F)."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.functrain.grouped_outer(x, y, ends))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, y, ends = ctx.saved_tensors
        of_x = _Product.apply(y, grad.mT, ends) if ctx.needs_input_grad[0] else None
        of_y = _Product.apply(x, grad, ends) if ctx.needs_input_grad[1] else None
        return of_x, of_y, None

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], x: Tensor, y: Tensor, ends: Tensor) -> tuple[Tensor, int]:
        rows, others, all_ends = _lanes(info.batch_size, dims, x, y, ends)
        return _Outer.apply(rows, others, all_ends).unflatten(0, (info.batch_size, -1)), 0


def _lanes(lanes: int, dims: tuple[Any, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Put the lanes of a map one after another: their rows, their groups, and where these end."""
    x, other, ends = (
        t.expand(lanes, *t.shape) if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, dims, strict=True)
    )
    before = torch.arange(lanes, dtype=ends.dtype, device=ends.device)[:, None] * x.shape[1]
    return x.flatten(0, 1), other.flatten(0, 1), (ends + before).flatten()


# ---- the operations, opaque to a trace: how many rows a group has is known when they run ---------------------------


def _product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    x = x.contiguous()
    if _has_kernel(x, weight):
        return F.grouped_mm(x, weight, offs=ends)
    made = x.new_empty(x.shape[0], weight.shape[-1])
    start = 0
    for group, end in enumerate(ends.tolist()):
        torch.mm(x[start:end], weight[group], out=made[start:end])
        start = end
    return made


def _outer(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    made = x.new_empty(ends.shape[0], x.shape[-1], y.shape[-1])
    start = 0
    for group, end in enumerate(ends.tolist()):
        torch.mm(x[start:end].mT, y[start:end], out=made[group])  # zeros for a group without rows
        start = end
    return made


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    whole = all(size * x.element_size() % 16 == 0 for size in weight.shape[-2:])
    laid_out = weight.stride(-1) == 1 or weight.stride(-2) == 1
    known = x.dtype in (torch.bfloat16, torch.float16, torch.float32) and x.dtype == weight.dtype
    return whole and laid_out and known and x.device.type == "cpu" and 0 not in weight.stride()


_library = torch.library.Library("functrain", "FRAGMENT")
for _name, _body in (("grouped_product", _product), ("grouped_outer", _outer)):
    _library.define(f"{_name}(Tensor x, Tensor other, Tensor ends) -> Tensor")
    _library.impl(_name, _body, "CompositeExplicitAutograd")
torch.library.register_fake(
    "functrain::grouped_product", lambda x, weight, ends: x.new_empty(x.shape[0], weight.shape[-1]), lib=_library
)
torch.library.register_fake(
    "functrain::grouped_outer",
    lambda x, y, ends: x.new_empty(ends.shape[0], x.shape[-1], y.shape[-1]),
    lib=_library,
)
DOTS.update({torch.ops.functrain.grouped_product.default, torch.ops.functrain.grouped_outer.default})
