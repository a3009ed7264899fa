"""Updates kept within bounds."""

from __future__ import annotations

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.numerics.safe import clamp, like, scaled
from functrain.optim.transformation import (
    EmptyState,
    GradientTransformation,
    Updates,
    check_real,
    init_empty_state,
)
from functrain.schedules import Scalar
from functrain.tree import Params
from functrain.tree.reductions import length, wide

ClipState = EmptyState
ClipByGlobalNormState = EmptyState


def global_norm(updates: Updates) -> Tensor:
    """Return the Euclidean norm of all updates together, (), at least float32.

    >>> ft.optim.global_norm({"w": torch.tensor([3.0, 0.0]), "b": torch.tensor(4.0)})
    tensor(5.)
    """
    return tree.norm(updates)


def clip(max_delta: Scalar) -> GradientTransformation:
    """Clip every element to [-max_delta, max_delta].

    Raises: TypeError naming the leaf that is complex.

    >>> tx = ft.optim.clip(1.0)
    >>> tx.update(torch.tensor([0.5, -3.0]), tx.init(torch.zeros(2)))[0]
    tensor([ 0.5000, -1.0000])
    """

    def update(updates: Updates, state: EmptyState, params: Params | None = None) -> tuple[Updates, EmptyState]:
        check_real(updates, "clip")
        return tree.map(lambda g: clamp(g, -max_delta, max_delta), updates, by_kind=True), state

    return GradientTransformation(init_empty_state, update)


def clip_by_global_norm(max_norm: Scalar) -> GradientTransformation:
    """Scale updates down together until their global norm is `max_norm`; smaller ones stay bit for bit.

    Equals (g / norm) * max_norm to rounding, with no epsilon in it: the factor is made once, not for every element.

    Source: Pascanu et al. 2012 (arXiv:1211.5063), algorithm 1.

    >>> optimizer, params = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.sgd(0.1)), torch.zeros(2)
    >>> optimizer.update(torch.tensor([6.0, 8.0]), optimizer.init(params), params)[0]
    tensor([-0.0600, -0.0800])
    """

    def update(updates: Updates, state: EmptyState, params: Params | None = None) -> tuple[Updates, EmptyState]:
        norm = global_norm(updates)
        small = norm < max_norm
        factor = torch.where(small, 1.0, max_norm / torch.where(small, 1.0, norm))
        return tree.map(lambda g: scaled(g, factor), updates, by_kind=True), state

    return GradientTransformation(init_empty_state, update)


def clip_by_block_rms(threshold: Scalar) -> GradientTransformation:
    """Scale each leaf down until its root mean square is `threshold`.

    >>> tx, updates = ft.optim.clip_by_block_rms(1.0), {"w": torch.tensor([0.0, 8.0]), "b": torch.tensor([0.5])}
    >>> tx.update(updates, tx.init(updates))[0]
    {'w': tensor([0.0000, 1.4142]), 'b': tensor([0.5000])}
    """

    def clip_leaf(g: Tensor) -> Tensor:
        size = length(g, torch.mean)
        return (wide(g) / torch.clamp(size / like(threshold, size), min=1.0)).to(g.dtype)

    def update(updates: Updates, state: EmptyState, params: Params | None = None) -> tuple[Updates, EmptyState]:
        return tree.map(clip_leaf, updates, by_kind=True), state

    return GradientTransformation(init_empty_state, update)
