"""Updates and parameters kept where they should be."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.clipping.norms import global_norm
from functrain.optim.numerics.safe import plus, scaled
from functrain.optim.transformation import (
    EmptyState,
    GradientTransformation,
    Updates,
    check_params,
    check_real,
    init_empty_state,
)
from functrain.schedules import Scalar
from functrain.tree import Params, Tree

NonNegativeParamsState = EmptyState


class ZeroNansState(NamedTuple):
    found_nan: Tree  # (), bool, for each leaf of params: whether its last update had a NaN


def keep_params_nonnegative() -> GradientTransformation:
    """Change updates so that params, if they are not negative, do not become so.

    Raises: ValueError without params; TypeError naming the leaf that is complex.

    >>> params, tx = torch.tensor([1.0, 1.0]), ft.optim.keep_params_nonnegative()
    >>> tx.update(torch.tensor([-0.5, -3.0]), tx.init(params), params)[0]
    tensor([-0.5000, -1.0000])
    """

    def update(updates: Updates, state: EmptyState, params: Params | None = None) -> tuple[Updates, EmptyState]:
        check_params(params, "keep_params_nonnegative")
        check_real(params, "keep_params_nonnegative")
        return tree.map(lambda u, p: torch.where(p + u < 0, -p, u), updates, params, by_kind=True), state

    return GradientTransformation(init_empty_state, update)


def zero_nans() -> GradientTransformation:
    """Replace NaN in updates by 0, and remember in which leaves it was.

    >>> tx = ft.optim.zero_nans()
    >>> updates, state = tx.update(torch.tensor([1.0, float("nan")]), tx.init(torch.zeros(2)))
    >>> updates, state.found_nan
    (tensor([1., 0.]), tensor(True))
    """

    def init(params: Params) -> ZeroNansState:
        return ZeroNansState(tree.map(lambda p: torch.zeros((), dtype=torch.bool, device=p.device), params))

    def update(updates: Updates, state: ZeroNansState, params: Params | None = None) -> tuple[Updates, ZeroNansState]:
        found = tree.map(lambda g: torch.isnan(g).any(), updates, by_kind=True)
        return tree.map(lambda g: torch.where(torch.isnan(g), 0.0, g), updates, by_kind=True), ZeroNansState(found)

    return GradientTransformation(init, update)


def centralize() -> GradientTransformation:
    """Subtract from each update of two or more dimensions its mean over all but the first.

    Source: Yong et al. 2020 (arXiv:2004.01461), equation 1.

    >>> tx = ft.optim.centralize()
    >>> tx.update(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), tx.init(torch.zeros(2, 2)))[0]
    tensor([[-1.,  1.],
            [ 0.,  0.]])
    """

    def update(updates: Updates, state: EmptyState, params: Params | None = None) -> tuple[Updates, EmptyState]:
        return tree.map(_less_mean, updates, by_kind=True), state

    return GradientTransformation(init_empty_state, update)


def normalize_by_update_norm(scale_factor: Scalar = 1.0, eps: Scalar = 1e-6) -> GradientTransformation:
    """Rescale updates together to norm `scale_factor`.

    >>> tx = ft.optim.normalize_by_update_norm(scale_factor=10.0)
    >>> tx.update(torch.tensor([0.3, 0.4]), tx.init(torch.zeros(2)))[0].round(decimals=3)
    tensor([6., 8.])
    """

    def update(updates: Updates, state: EmptyState, params: Params | None = None) -> tuple[Updates, EmptyState]:
        factor = scale_factor / plus(global_norm(updates), eps)
        return tree.map(lambda g: scaled(g, factor), updates, by_kind=True), state

    return GradientTransformation(init_empty_state, update)


def _less_mean(g: Tensor) -> Tensor:
    return g - g.mean(tuple(range(1, g.dim())), keepdim=True) if g.dim() > 1 else g
