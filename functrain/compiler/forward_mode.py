"""Forward mode in a trace: tangents of zero as tensors of zeros.

torch has a kind of tensor that is zero without any memory, and fills in tangents that nobody gave with it. On tensors
without data, as in a trace, torch 2.13 loses the device of such a zero within an addition or product, and stops at
"found at least two devices, cpu and meta"; and a tangent that it writes into the memory of an expanded tensor cannot be
written when the trace is run. The compiler takes zeros out of the arithmetic anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

# torch imports what forward mode needs when it is first used, which should not be within a trace
torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.zeros(()),))


# operations that return a zero without memory
ZEROS = {aten._efficientzerotensor.default, aten._new_zeros_with_same_feature_meta.default}


def dense_zeros(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Return a tensor of zeros in place of what one of `ZEROS` returns."""
    if func is aten._efficientzerotensor.default:
        return torch.zeros(*args, **kwargs)
    tangent, primal = args
    return _zeros_laid_out_as(primal, tangent.shape[: kwargs.get("self_num_batch_dims", 0)])


def _zeros_laid_out_as(primal: Tensor, mapped: Sequence[int]) -> Tensor:
    """Return a tangent for each element of the dimensions `mapped`; torch takes a view of it where it takes one of the
    primal, and wants both in the same places of memories of one size."""
    dims = range(primal.dim())
    order = sorted(dims, key=primal.stride, reverse=True)
    shares = _shares_memory(primal, order)
    if shares or primal.untyped_storage().nbytes() == primal.nbytes:  # has it for itself, without gaps
        order = list(dims) if shares else order
        shape = [primal.shape[dim] for dim in order]
        zeros = torch.zeros((*mapped, *shape), dtype=primal.dtype, device=primal.device)
        return zeros.permute([*range(len(mapped)), *[len(mapped) + order.index(dim) for dim in dims]])
    size = primal.untyped_storage().nbytes() // primal.itemsize
    zeros = torch.zeros((*mapped, size), dtype=primal.dtype, device=primal.device)
    strides = (*zeros.stride()[:-1], *primal.stride())
    return zeros.as_strided((*mapped, *primal.shape), strides, primal.storage_offset())


def _shares_memory(x: Tensor, order: Sequence[int]) -> bool:
    """Tell whether elements of x lie in one place, as those of an expanded tensor do: it cannot be written to."""
    end = 1
    for dim in reversed(order):
        if x.shape[dim] > 1 and x.stride(dim) < end:
            return True
        end += x.stride(dim) * (x.shape[dim] - 1)
    return False
