"""GaLore: moments of gradients projected to few dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.combining import chain
from functrain.optim.decay import add_decayed_weights
from functrain.optim.masking import MaskOrFn, made_for
from functrain.optim.numerics.looping import when
from functrain.optim.numerics.safe import like, zero_count
from functrain.optim.optimizers.adam import scale_by_adam
from functrain.optim.scaling import scale_by_learning_rate
from functrain.optim.transformation import GradientTransformation, OptState, Updates, check_real, check_trainable
from functrain.schedules import Scalar, ScalarOrSchedule
from functrain.tree import Params, Tree


class GaLoreDimensionNumbers(NamedTuple):
    """Which dimensions of a weight are summed over, and which come out: all of them, each once."""

    reduction_axis: Sequence[int] | int = 0
    output_axis: Sequence[int] | int = 1


# GaLoreDimensionNumbers for all matrices, a tree of them with None where nothing is projected, or what makes that tree
GaLoreDimNumsOrFn: TypeAlias = GaLoreDimensionNumbers | Tree | Callable[[Params], Tree]


class GaLoreState(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far
    base_optimizer_state: OptState  # that of the projected params
    projector: Tree  # for each leaf (m, n): (max(m, n), r) with orthonormal columns; (0, 0) where nothing is projected


def scale_by_galore(
    rank: int = 128,
    update_proj_gap: int | Tensor = 200,
    scale: Scalar = 1.0,
    base_optimizer: GradientTransformation | None = None,
    weight_dimension_numbers: GaLoreDimNumsOrFn | None = None,
) -> GradientTransformation:
    """Run `base_optimizer`, Adam if None, on the part of each matrix that lies in `rank` dimensions.

    They are those of the largest singular values of the gradient, found anew every `update_proj_gap` updates: eagerly
    at those updates only, vmapped or compiled at each. `base_optimizer` sees no params. Other leaves pass through it
    whole. Equals `optax.contrib.scale_by_galore`, whose singular vectors of float64 have the roundings of float32.

    Source: Zhao et al. 2024 (arXiv:2403.03507), algorithm 1.

    Raises: ValueError for a rank below 1, and for dimension numbers that do not name each dimension once;
    TypeError naming the leaf that is complex.

    >>> tx = ft.optim.scale_by_galore(rank=1, base_optimizer=ft.optim.identity())
    >>> updates, _ = tx.update(torch.diag(torch.tensor([3.0, 1.0])), tx.init(torch.zeros(2, 2)))
    >>> torch.linalg.matrix_rank(updates)
    tensor(1)
    """
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"scale_by_galore: expected a rank of at least 1, came {rank!r}")
    inner = scale_by_adam() if base_optimizer is None else base_optimizer

    def init(params: Params) -> GaLoreState:
        check_trainable(params)
        check_real(params, "scale_by_galore")
        rows = list(zip(tree.leaves(params), _numbers(weight_dimension_numbers, params), strict=True))
        structure = tree.flatten(params)[1]
        projectors = tree.unflatten(structure, [_zero_projector(p, dims, rank) for p, dims in rows])
        small = tree.unflatten(structure, [_projected(p, _zero_projector(p, dims, rank), dims) for p, dims in rows])
        return GaLoreState(zero_count(params), inner.init(small), projectors)

    def update(updates: Updates, state: GaLoreState, params: Params | None = None) -> tuple[Updates, GaLoreState]:
        numbers = _numbers(weight_dimension_numbers, updates)
        leaves, structure = tree.flatten(updates)

        def look(projectors: list[Tensor]) -> list[Tensor]:
            rows = zip(leaves, projectors, numbers, strict=True)
            return [p if dims is None else _leading(g, p, dims) for g, p, dims in rows]

        due = state.count % update_proj_gap == 0
        projectors = when(due, look, tree.leaves(state.projector))
        small = [_projected(g, p, dims) for g, p, dims in zip(leaves, projectors, numbers, strict=True)]
        new, inner_state = inner.update(tree.unflatten(structure, small), state.base_optimizer_state, None)
        rows = zip(tree.leaves(new), leaves, projectors, numbers, strict=True)
        full = [_lifted(u, g, p, dims, scale) for u, g, p, dims in rows]
        new_state = GaLoreState(state.count + 1, inner_state, tree.unflatten(structure, projectors))
        return tree.unflatten(structure, full), new_state

    return GradientTransformation(init, update)


def galore(
    learning_rate: ScalarOrSchedule,
    rank: int = 128,
    update_proj_gap: int | Tensor = 200,
    scale: Scalar = 1.0,
    base_optimizer: GradientTransformation | None = None,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn = None,
    weight_dimension_numbers: GaLoreDimNumsOrFn | None = None,
) -> GradientTransformation:
    """GaLore: `scale_by_galore`, with decoupled weight decay of the whole params.

    Source: Zhao et al. 2024 (arXiv:2403.03507), algorithm 1.

    >>> params, optimizer = torch.zeros(32, 16), ft.optim.galore(0.1, rank=4)
    >>> state = optimizer.init(params)
    >>> sorted({tuple(leaf.shape) for leaf in ft.tree.leaves(state)})
    [(), (4, 16), (32, 4)]
    """
    return chain(
        scale_by_galore(rank, update_proj_gap, scale, base_optimizer, weight_dimension_numbers),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


Dims: TypeAlias = tuple[list[int], list[int]] | None  # dimensions of rows and of columns, or nothing to project


def _matrix(x: Tensor, dims: tuple[list[int], list[int]]) -> Tensor:
    rows, columns = [math.prod([x.shape[dim] for dim in part]) for part in dims]
    return x.permute([*dims[0], *dims[1]]).reshape(rows, columns)


def _zero_projector(p: Tensor, dims: Dims, rank: int) -> Tensor:
    if dims is None:
        return p.new_zeros((0, 0))
    m, n = _matrix(p, dims).shape
    return p.new_zeros((max(m, n), min(rank, m, n)))


def _leading(g: Tensor, projector: Tensor, dims: tuple[list[int], list[int]]) -> Tensor:
    m = _matrix(g, dims)
    u, _, vh = torch.linalg.svd(m.to(torch.promote_types(m.dtype, torch.float32)), full_matrices=False)
    vectors = u if m.shape[0] >= m.shape[1] else vh.mT
    return vectors[:, : projector.shape[1]].to(g.dtype).contiguous()


def _projected(g: Tensor, projector: Tensor, dims: Dims) -> Tensor:
    if dims is None:
        return g
    m = _matrix(g, dims)
    return projector.mT @ m if m.shape[0] >= m.shape[1] else m @ projector


def _lifted(u: Tensor, g: Tensor, projector: Tensor, dims: Dims, scale: Scalar) -> Tensor:
    if dims is None:
        return u
    m = _matrix(g, dims)
    full = projector @ u if m.shape[0] >= m.shape[1] else u @ projector.mT
    order = [*dims[0], *dims[1]]
    moved = full.reshape([g.shape[dim] for dim in order])
    return (like(scale, moved) * moved.permute([order.index(dim) for dim in range(g.dim())])).to(g.dtype)


def _numbers(spec: GaLoreDimNumsOrFn | None, params: Params) -> list[Dims]:
    """Return the dimensions of rows and columns of each leaf: all matrices without a spec."""
    if spec is None:
        return [([0], [1]) if p.dim() == 2 else None for p in tree.leaves(params)]
    found = made_for(spec, params)
    if isinstance(found, GaLoreDimensionNumbers):
        return [_dims(path, p, found) if p.dim() >= 2 else None for path, p in tree.items(params)]
    return [_dims(path, p, _at(found, path)) for path, p in tree.items(params)]


def _at(spec: Tree, path: str) -> Any:
    for name in path.split("/") if path else []:
        if spec is None or isinstance(spec, GaLoreDimensionNumbers):
            break
        spec = tree.at(spec, name)
    return spec


def _dims(path: str, p: Tensor, numbers: GaLoreDimensionNumbers | None) -> Dims:
    if numbers is None:
        return None
    size = max(p.dim(), 1)
    rows, columns = [[dim % size for dim in ([dims] if isinstance(dims, int) else dims)] for dims in numbers]
    if p.dim() < 2 or sorted([*rows, *columns]) != list(range(p.dim())):
        raise ValueError(
            f"scale_by_galore: {path}: expected numbers that name each dimension of {tuple(p.shape)} once, came "
            f"{numbers}; give None for what is not to be projected"
        )
    return rows, columns
