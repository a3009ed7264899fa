"""Forward mode in a trace: tangents of zero as tensors of zeros.

torch has a kind of tensor that is zero without any memory, and fills in tangents that nobody gave with it. On tensors
without data, as in a trace, torch 2.13 loses the device of such a zero within an addition or product, and stops at
"found at least two devices, cpu and meta"; and a tangent that it writes into the memory of an expanded tensor cannot be
written when the trace is run. The compiler takes zeros out of the arithmetic anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class DenseZeros(TorchDispatchMode):
    """Inside, zero tangents are ordinary tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._efficientzerotensor.default:
            return torch.zeros(*args, **kwargs)
        if func is aten._new_zeros_with_same_feature_meta.default:
            tangent, primal = args
            mapped = tangent.shape[: kwargs.get("self_num_batch_dims", 0)]
            # laid out as the primal is: torch takes a view of both
            dims = range(primal.dim())
            order = list(dims) if 0 in primal.stride() else sorted(dims, key=primal.stride, reverse=True)
            shape = [primal.shape[dim] for dim in order]
            zeros = torch.zeros((*mapped, *shape), dtype=primal.dtype, device=primal.device)
            places = [len(mapped) + order.index(dim) for dim in dims]
            return zeros.permute(*range(len(mapped)), *places)
        return func(*args, **kwargs)
