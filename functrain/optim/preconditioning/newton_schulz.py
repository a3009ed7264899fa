"""Newton-Schulz steps: the nearest orthogonal matrix, nearly, by products alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from functrain.optim.numerics.safe import plus, shrunk
from functrain.schedules import Scalar
from functrain.tree.reductions import length, wide

Preconditioning: TypeAlias = Literal["frobenius", "spectral", "aol", "schatten"]


class MuonDimensionNumbers(NamedTuple):
    """Which dimensions of a weight are summed over, and which come out; any others are a batch of matrices."""

    reduction_axis: Sequence[int] | int = 0
    output_axis: Sequence[int] | int = 1


def orthogonalize_via_newton_schulz(
    x: Tensor,
    ns_coeffs: Tensor,
    ns_steps: int = 5,
    preconditioning: Preconditioning = "frobenius",
    eps: Scalar = 1e-8,
    dimension_numbers: MuonDimensionNumbers | None = None,
) -> Tensor:
    """Push all singular values of a matrix towards 1: x to a * x + (b * x xᵀ + c * (x xᵀ)²) x, `ns_steps` times.

    Before the first step they are brought below 1 by a norm, "frobenius" or "spectral", or within it by a bound, "aol"
    or "schatten".

    Source: Jordan et al. 2024, Muon; Boissin et al. 2025 (arXiv:2512.04632) for "aol";
    Grishina et al. 2025 (arXiv:2506.10935) for "schatten".

    Raises: ValueError for a tensor that is no matrix and has no dimension numbers.

    >>> x = torch.tensor([[3.0, 0.0], [0.0, -1.0]])
    >>> ft.optim.orthogonalize_via_newton_schulz(x, torch.tensor([1.5, -0.5, 0.0]), ns_steps=20).round(decimals=3)
    tensor([[ 1.,  0.],
            [ 0., -1.]])
    """
    return orthogonalize_all([x], [dimension_numbers], ns_coeffs, ns_steps, preconditioning, eps)[0]


def orthogonalize_all(
    leaves: Sequence[Tensor],
    numbers: Sequence[MuonDimensionNumbers | None],
    coefficients: Tensor,
    steps: int,
    preconditioning: str,
    eps: Scalar,
) -> list[Tensor]:
    """Orthogonalize each leaf, those of one shape as one batch: a compiler takes as long over a batch as over a matrix.

    The same as each by itself, to rounding.
    """
    if preconditioning not in ("frobenius", "spectral", "aol", "schatten"):
        raise ValueError(f"newton_schulz: unknown preconditioning {preconditioning!r}; see the docstring for the four")
    layouts = [_Matrices(leaf, of) for leaf, of in zip(leaves, numbers, strict=True)]
    alike: dict[Any, list[int]] = defaultdict(list)
    for i, (leaf, layout) in enumerate(zip(leaves, layouts, strict=True)):
        alike[layout.rows, layout.columns, leaf.dtype, leaf.device].append(i)
    done: dict[int, Tensor] = {}
    for group in alike.values():
        batches = [layouts[i].take(leaves[i]) for i in group]
        joined = torch.cat(batches) if len(batches) > 1 else batches[0]
        new = joined
        if joined.numel():
            new = _newton_schulz(joined, coefficients.to(joined.dtype), steps, preconditioning, eps)
        parts = new.split([batch.shape[0] for batch in batches])
        done.update({i: layouts[i].put_back(part) for i, part in zip(group, parts, strict=True)})
    return [done[i] for i in range(len(leaves))]


class _Matrices:
    """How a leaf is a batch of matrices that are not higher than wide."""

    def __init__(self, x: Tensor, numbers: MuonDimensionNumbers | None) -> None:
        if x.dim() != 2 and numbers is None:
            raise ValueError(f"newton_schulz: {tuple(x.shape)} is no matrix; pass MuonDimensionNumbers for it")
        inputs, outputs = dims_of(x, MuonDimensionNumbers() if numbers is None or x.dim() == 2 else numbers)
        batch = [dim for dim in range(x.dim()) if dim not in (*inputs, *outputs)]
        self.batch = math.prod([x.shape[dim] for dim in batch])
        size_in, size_out = [math.prod([x.shape[dim] for dim in dims]) for dims in (inputs, outputs)]
        self.rows, self.columns = min(size_in, size_out), max(size_in, size_out)
        # a high matrix is taken as its transpose
        self.order = [*batch, *inputs, *outputs] if size_in <= size_out else [*batch, *outputs, *inputs]
        self.moved = [x.shape[dim] for dim in self.order]

    def take(self, x: Tensor) -> Tensor:
        return x.permute(self.order).reshape(self.batch, self.rows, self.columns)  # (B, rows, columns)

    def put_back(self, matrices: Tensor) -> Tensor:
        back = [self.order.index(dim) for dim in range(len(self.order))]
        return matrices.reshape(self.moved).permute(back)


def _newton_schulz(x: Tensor, coefficients: Tensor, steps: int, preconditioning: str, eps: Scalar) -> Tensor:
    full = wide(x)  # torch has no norm of a bfloat16 matrix, and 1e-8 is 0 in float16
    if preconditioning == "frobenius":
        full = full / plus(_norm(full), eps)
    elif preconditioning == "spectral":
        full = full / plus(torch.linalg.matrix_norm(full, 2, keepdim=True), eps)
    else:
        full = shrunk(full, _norm(full))
    x = full.to(x.dtype)
    rows = coefficients.unbind() if coefficients.dim() == 2 else [coefficients] * steps
    for i, (a, b, c) in enumerate(row.unbind() for row in rows):
        bounding = i == 0 and preconditioning in ("aol", "schatten")
        factor = full if bounding else x
        gram = factor @ factor.mT.conj()  # (B, n, n)
        if bounding:
            aol = preconditioning == "aol"
            size = gram.abs().sum(-1, keepdim=True) if aol else _norm(gram)
            root = torch.rsqrt(torch.clamp(size, min=eps))  # (B, n, 1) or (B, 1, 1)
            x, gram = (full * root).to(x.dtype), (gram * root * root.mT).to(x.dtype)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


def _norm(matrices: Tensor) -> Tensor:
    return length(matrices, lambda squares: torch.sum(squares, (-2, -1), keepdim=True))  # (B, 1, 1)


def dims_of(x: Tensor, numbers: MuonDimensionNumbers) -> tuple[list[int], list[int]]:
    """Return the dimensions that are summed over and those that come out, counted from the front."""
    if x.dim() < 2:
        raise ValueError(f"muon: a weight needs two dimensions, came {tuple(x.shape)}; give it to AdamW")
    inputs, outputs = [[dim % x.dim() for dim in ([dims] if isinstance(dims, int) else dims)] for dims in numbers]
    if set(inputs) & set(outputs):
        raise ValueError(f"muon: {numbers} uses one dimension of {tuple(x.shape)} twice")
    return inputs, outputs
