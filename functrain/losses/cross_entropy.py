"""Cross entropy between logits and integer labels.

B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from functrain.losses.loss import Loss

Dim = int | tuple[int, ...]


def softmax_cross_entropy_with_integer_labels(
    logits: Tensor, labels: Tensor, dim: Dim = -1, where: Tensor | None = None
) -> Tensor:
    """Compute the cross entropy of the softmax of `logits` along `dim` and integer labels.

    Equals `optax.softmax_cross_entropy_with_integer_labels`. With several dims, a label is an index into them
    flattened. `where` keeps examples (the others lose 0, and their labels may be any integers, such as -100) or, in the
    logits' shape, classes.

    Shapes: labels, and the result: the logits' without `dim`; where: the labels' or the logits'.
    Raises: TypeError for labels that are no integers, ValueError for other shapes; IndexError for a label that is no
    class on the CPU, a device assertion elsewhere.

    >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    >>> ft.losses.softmax_cross_entropy_with_integer_labels(logits, torch.tensor([0, 1]))
    tensor([0.2395, 1.0986])
    """
    if labels.is_floating_point():
        raise TypeError(f"{_NAME}: expected integer labels, came {labels.dtype}")
    rows = _flatten_last(logits, dim)  # (..., V)
    if labels.shape != rows.shape[:-1]:
        raise ValueError(
            f"{_NAME}: expected labels {tuple(rows.shape[:-1])} for logits {tuple(logits.shape)} and dim {dim}, came "
            f"{tuple(labels.shape)}; expand or reshape them"
        )
    if where is None:
        return torch.logsumexp(rows, -1) - gathered(_NAME, rows, labels.long(), "by where=")
    kept = (_flatten_last(where, dim) if where.ndim == logits.ndim else where.unsqueeze(-1)).bool()  # (..., V or 1)
    some = kept.any(-1)  # (...)
    picked = gathered(_NAME, rows, torch.where(some, labels, 0).long(), "by where=")  # (...)
    # a row that keeps nothing is computed whole and then dropped: the logsumexp of nothing has a NaN gradient
    normalizers = torch.logsumexp(torch.where(kept | ~some.unsqueeze(-1), rows, -torch.inf), -1)
    return torch.where(some, normalizers - picked, 0.0)


_NAME = "softmax_cross_entropy_with_integer_labels"


def gathered(caller: str, x: Tensor, labels: Tensor, leave_out: str, dim: int = -1) -> Tensor:
    """Return the entry of x (..., V) that each label (...) names, (...).

    Raises: IndexError for a label that is no class, on the CPU.
    """
    try:
        return x.gather(dim, labels.unsqueeze(dim)).squeeze(dim)
    except (IndexError, RuntimeError) as error:
        found = re.search(r"index (-?\d+) is out of bounds .* with size (\d+)", str(error))
        if found is None:
            raise
        raise IndexError(
            f"{caller}: expected labels in [0, {found[2]}), came {found[1]}; leave out rows that do not count, such "
            f"as those of -100, {leave_out}"
        ) from error


def _flatten_last(x: Tensor, dim: Dim) -> Tensor:
    dims = [dim] if isinstance(dim, int) else list(dim)
    return x.movedim(dims, list(range(-len(dims), 0))).flatten(-len(dims))


def next_token(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Loss:
    """Sum the cross entropy of every token, times its mask; the Loss's weight is the sum of the mask.

    Equals `sum(mask * softmax_cross_entropy_with_integer_labels(logits, targets))`, in float32 for half-precision
    logits. The mask is boolean or floating-point weights; where it is zero the target may be any integer.

    Shapes: logits (B, T, V), targets and mask (B, T).
    Raises: ValueError for other shapes, TypeError for targets that are no integers, IndexError for a target that is no
    token where the mask is not zero, on the CPU.

    >>> logits, targets = torch.zeros(1, 3, 4), torch.tensor([[1, 2, -100]])
    >>> loss = ft.losses.next_token(logits, targets, mask=torch.tensor([[True, True, False]]))
    >>> loss.total / loss.weight, loss.weight
    (tensor(1.3863), tensor(2.))
    """
    check_shapes("next_token", "logits", logits, targets, mask)
    weights = weights_of(logits, targets, mask)  # (B, T)
    losses = -gathered("next_token", F.log_softmax(wide(logits), -1), legal(targets, mask), "by mask=")  # (B, T)
    return Loss(torch.sum(losses * weights), total_of(weights, mask), {})


def check_shapes(caller: str, name: str, x: Tensor, targets: Tensor, mask: Tensor | None) -> None:
    """Raise unless x is (B, T, ...) and targets and mask are (B, T), targets integers."""
    if x.shape[:-1] != targets.shape or (mask is not None and mask.shape != targets.shape):
        masked = "" if mask is None else f", mask {tuple(mask.shape)}"
        raise ValueError(
            f"{caller}: expected {name} (B, T, {name[0].upper()}) with targets and mask (B, T); "
            f"came {name} {tuple(x.shape)}, targets {tuple(targets.shape)}{masked}"
        )
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise TypeError(f"{caller}: expected integer targets, came {targets.dtype}; pass targets.long()")


def weights_of(x: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mask, or ones, as float32 (float64 beside float64)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.ones_like(targets, dtype=dtype) if mask is None else mask.to(dtype)


def total_of(weights: Tensor, mask: Tensor | None) -> Tensor:
    """Return the sum of the weights, (); without a mask it is their number, which needs no kernel."""
    return weights.new_full((), weights.numel()) if mask is None else torch.sum(weights)


def legal(targets: Tensor, mask: Tensor | None) -> Tensor:
    """Return the targets as int64, 0 where the mask is zero: padding may hold -100 or anything."""
    return targets.long() if mask is None else torch.where(mask != 0, targets, 0).long()


def wide(x: Tensor) -> Tensor:
    """Return x in at least float32: bfloat16 has 8 bits, and a softmax over a vocabulary would lose its tail."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
