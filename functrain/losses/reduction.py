"""What several losses share: sums over some dims of some elements, and checks of what they are given."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Dim: TypeAlias = int | tuple[int, ...]
Scalar: TypeAlias = float | Tensor


def dims_of(x: Tensor, dim: Dim | None) -> tuple[int, ...]:
    """Return the dims that `dim` stands for; None stands for all."""
    if dim is None:
        return tuple(range(x.ndim))
    return (dim,) if isinstance(dim, int) else tuple(dim)


def total(x: Tensor, dim: Dim | None, where: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
    """Return the sum of x over `dim`, of the elements that `where` keeps.

    An element that is left out may be infinite or NaN: neither the sum nor its gradient sees it.
    """
    dims = dims_of(x, dim)
    kept = x if where is None else torch.where(where, x, 0.0)
    # torch takes an empty tuple for all dims
    return torch.sum(kept, dims, keepdim=keepdim) if dims else kept


def aligned(where: Tensor | None, x: Tensor, dim: Dim | None) -> Tensor | None:
    """Return the mask as a boolean that broadcasts with x; one without `dim` gets it."""
    if where is None:
        return None
    if where.ndim != x.ndim:
        for d in sorted(d % x.ndim for d in dims_of(x, dim)):
            where = where.unsqueeze(d)
    return where.bool()


def log_softmax(x: Tensor, dim: Dim | None, where: Tensor | None = None) -> Tensor:
    """Return the log-softmax over one or several dims of the elements that `where` keeps; elsewhere it is 0.

    A row that keeps nothing is 0, and so is its gradient.
    """
    dims = dims_of(x, dim)
    if where is not None:
        # a row that keeps nothing is computed whole and dropped below: the logsumexp of nothing has a NaN gradient
        x = torch.where(where | ~where.any(dims, keepdim=True), x, -torch.inf)
    # the largest first: beside a large logsumexp, a logit loses the bits that its difference needs
    shifted = x - torch.amax(x, dims, keepdim=True).detach()
    logs = shifted - torch.log(torch.sum(torch.exp(shifted), dims, keepdim=True))
    return logs if where is None else torch.where(where, logs, 0.0)


def positive_part(x: Tensor) -> Tensor:
    """Return max(x, 0), with the derivative 1/2 at 0, as JAX has it."""
    return torch.maximum(x, x.new_zeros(()))


def one_hot(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Return (..., classes): 1 at the label, 0 elsewhere; all 0 for a label that is no class."""
    return (labels.unsqueeze(-1) == torch.arange(classes, device=labels.device)).to(dtype)


def check_floating(loss: str, **tensors: Tensor) -> None:
    """Raise a TypeError that names the tensor which is no floating-point one."""
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise TypeError(f"{loss}: expected floating-point {name}, came {x.dtype}; pass {name}.float()")


def check_integer(loss: str, **tensors: Tensor) -> None:
    """Raise a TypeError that names the tensor which holds no integers."""
    for name, x in tensors.items():
        if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise TypeError(f"{loss}: expected integer {name}, came {x.dtype}; pass {name}.long()")


def check_same_shape(loss: str, **tensors: Tensor) -> None:
    """Raise a ValueError that names two tensors of different shapes: broadcasting would hide a mistake."""
    (first, a), *rest = tensors.items()
    for name, b in rest:
        if a.shape != b.shape:
            raise ValueError(
                f"{loss}: expected {first} and {name} of one shape, came {tuple(a.shape)} and {tuple(b.shape)}; "
                f"expand one"
            )
