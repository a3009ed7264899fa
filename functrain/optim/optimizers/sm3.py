"""SM3: squares of a tensor covered by its rows, columns and so on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.combining import chain
from functrain.optim.numerics.moments import moment_dtype, zero_moments
from functrain.optim.numerics.safe import (
    add_scaled,
    lerp,
    like,
    plus,
    squarable,
)
from functrain.optim.scaling import scale
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    Updates,
    check_real,
)
from functrain.schedules import Scalar
from functrain.tree import Params, Tree
from functrain.tree.reductions import wide


class ScaleBySM3State(NamedTuple):
    mu: Tree  # for each leaf of params, a list with a vector for each dimension: the largest sums of squares there
    nu: Tree  # like params: first moment


def scale_by_sm3(b1: Scalar = 0.9, b2: Scalar = 1.0, eps: Scalar = 1e-8) -> GradientTransformation:
    """Divide updates by the root of a sum of squares of which only the largest of each slice is kept, then average.

    A () leaf, which optax refuses, keeps a list of one () tensor.

    Source: Anil et al. 2019 (arXiv:1901.11150), algorithm SM3-II.

    Raises: TypeError naming the leaf that is complex.

    >>> params, tx = torch.zeros(300, 200), ft.optim.scale_by_sm3()
    >>> [bound.shape for bound in tx.init(params).mu]
    [torch.Size([300]), torch.Size([200])]
    """

    def init(params: Params) -> ScaleBySM3State:
        check_real(params, "scale_by_sm3")
        mu = tree.map(
            lambda p: [p.new_zeros(size, dtype=moment_dtype(p)) for size in p.shape or [()]],
            params,
        )
        return ScaleBySM3State(mu, zero_moments(params))

    def update(
        updates: Updates, state: ScaleBySM3State, params: Params | None = None
    ) -> tuple[Updates, ScaleBySM3State]:
        tree.check_same_structure(state.nu, updates, what="updates, against what they are for")
        new_weight = 1 - b2 if isinstance(b2, Tensor) or b2 != 1.0 else 1.0
        leaves, structure = tree.flatten(updates)
        covers = iter(tree.leaves(state.mu))
        new, moments, new_covers = [], [], []
        for g, m in zip(leaves, tree.leaves(state.nu), strict=True):
            dtype, g = g.dtype, squarable(wide(g))
            cover = [next(covers) for _ in range(max(g.dim(), 1))]
            total = add_scaled(like(b2, g) * _smallest(cover, g), new_weight, g * g)
            root = torch.where(total > 0, torch.rsqrt(plus(total, eps)), 0.0)
            moments.append(lerp(m, g * root, 1 - b1).to(m.dtype))
            new.append(moments[-1].to(dtype))
            new_covers.append([_largest(total, dim).to(v.dtype) for dim, v in enumerate(cover)])
        nu = tree.unflatten(structure, moments)
        return tree.unflatten(structure, new), ScaleBySM3State(tree.unflatten(structure, new_covers), nu)

    return GradientTransformation(init, update)


def sm3(learning_rate: Scalar, momentum: Scalar = 0.9) -> GradientTransformationExtraArgs:
    """SM3: `scale_by_sm3`, then minus the learning rate.

    >>> optimizer, params = ft.optim.sm3(0.1, momentum=0.0), torch.zeros(1, 2)
    >>> optimizer.update(torch.tensor([[3.0, -0.5]]), optimizer.init(params), params)[0]
    tensor([[-0.1000,  0.1000]])
    """
    return chain(scale_by_sm3(momentum), scale(-learning_rate))


def _smallest(cover: list[Tensor], g: Tensor) -> Tensor:
    """Return, for each element, the smallest of the bounds of the slices that it is in."""
    bounds = [v.reshape([-1 if i == dim else 1 for i in range(g.dim())]) for dim, v in enumerate(cover)]
    least = bounds[0]
    for bound in bounds[1:]:
        least = torch.minimum(least, bound)
    return least


def _largest(total: Tensor, dim: int) -> Tensor:
    if total.numel() == 0:
        return total.new_zeros(total.shape[dim] if total.dim() else ())
    return total if total.dim() < 2 else total.amax([i for i in range(total.dim()) if i != dim])
