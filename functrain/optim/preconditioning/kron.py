"""Kron: PSGD with a Kronecker-factored preconditioner that whitens updates."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

import functrain.random as random
import functrain.tree as tree
from functrain.optim.clipping.norms import clip_by_block_rms
from functrain.optim.combining import chain
from functrain.optim.decay import add_decayed_weights
from functrain.optim.masking import MaskOrFn
from functrain.optim.numerics.looping import when
from functrain.optim.numerics.moments import bias_correction, update_moment, zero_moments
from functrain.optim.numerics.random_trees import random_like
from functrain.optim.numerics.safe import device_of, like, shrunk, zero_count
from functrain.optim.preconditioning.factors import gram, group, multiply, precise, unfold
from functrain.optim.scaling import scale_by_learning_rate
from functrain.optim.transformation import GradientTransformation, GradientTransformationExtraArgs, Updates, check_real
from functrain.schedules import Scalar, ScalarOrSchedule, exponential_decay
from functrain.tree import Params, Tree
from functrain.tree.reductions import length

# always for 500 updates, then ever more seldom, in the end at 3 of 100: what the authors' code does
_LESS_OFTEN = exponential_decay(1.0, 1, math.exp(-0.001), 500, end_value=0.03)


class ScaleByKronState(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far
    mu: Tree  # like params, in mu_dtype if given: first moment
    factors: Tree  # for each leaf, a tuple for each dimension: upper triangle (n, n), or diagonal (n,)
    key: Tensor  # (2,), int32: the next key


def scale_by_kron(
    b1: Scalar = 0.9,
    preconditioner_update_probability: ScalarOrSchedule = _LESS_OFTEN,
    max_size_triangular: int = 8192,
    min_ndim_triangular: int = 2,
    preconditioner_lr: Scalar = 0.1,
    preconditioner_init_scale: Scalar = 1.0,
    damping: Scalar = 1e-9,
    mu_dtype: torch.dtype | None = None,
    key: Tensor | None = None,
) -> GradientTransformation:
    """Multiply the first moment by QᵀQ, where Q has a factor for each dimension and learns to whiten it.

    The expectation of xᵀPx + vᵀP⁻¹v, x the moment and v random normal numbers, is least where P = QᵀQ is the inverse
    root of the covariance of x. Q descends along its relative gradient, by `preconditioner_lr` over a bound of its
    norm; eagerly only at the updates that a random number below `preconditioner_update_probability` chooses, vmapped or
    compiled it is computed at each. A factor is an upper triangle, or a diagonal for dimensions above
    `max_size_triangular` and leaves of fewer than `min_ndim_triangular`. `damping` times v is added to x, so that Q
    stays finite where x is 0. A leaf draws v by its number among the leaves.

    Source: Li 2015 (arXiv:1512.04202); Pooladzandi and Li 2024 (arXiv:2402.04553).

    Raises: TypeError naming the leaf that is complex.

    >>> tx = ft.optim.scale_by_kron(max_size_triangular=8)
    >>> [factor.shape for factor in ft.tree.leaves(tx.init(torch.zeros(4, 16)).factors)]  # triangle, diagonal
    [torch.Size([4, 4]), torch.Size([16])]
    """

    def init(params: Params) -> ScaleByKronState:
        check_real(params, "scale_by_kron")
        moments = zero_moments(params, mu_dtype)
        leaves, structure = tree.flatten(tree.map(_at_least_1d, params))
        factors = [
            tuple(
                _start(p, dim, min_ndim_triangular, max_size_triangular, preconditioner_init_scale)
                for dim in range(p.dim())
            )
            for p in leaves
        ]
        start = random.key(0) if key is None else key.clone()
        return ScaleByKronState(
            zero_count(params), moments, tree.unflatten(structure, factors), start.to(device_of(params))
        )

    def update(
        updates: Updates, state: ScaleByKronState, params: Params | None = None
    ) -> tuple[Updates, ScaleByKronState]:
        count = state.count + 1
        mu = update_moment(updates, state.mu, b1, 1)
        moments = tree.map(lambda m: precise(_at_least_1d(m)), bias_correction(mu, b1, count))
        next_key, choice, noise = random.split(state.key, 3).unbind()
        probability = (
            preconditioner_update_probability(state.count)
            if callable(preconditioner_update_probability)
            else preconditioner_update_probability
        )

        def learn(flat: list[Tensor]) -> list[Tensor]:
            rows = zip(
                tree.leaves(moments), tree.leaves(random_like(noise, moments)), group(flat, moments), strict=True
            )
            return [q for x, v, row in rows for q in _learned(x + like(damping, v) * v, v, row, preconditioner_lr)]

        due = random.uniform(choice) < probability
        factors = when(due, learn, tree.leaves(state.factors))
        rows = zip(tree.leaves(updates), tree.leaves(moments), group(factors, moments), strict=True)
        new = [_preconditioned(x, row).reshape(g.shape).to(g.dtype) for g, x, row in rows]
        return tree.unflatten(tree.structure(updates), new), ScaleByKronState(
            count,
            tree.cast_like(mu, state.mu),
            tree.unflatten(tree.structure(state.factors), factors),
            next_key,
        )

    return GradientTransformation(init, update)


def kron(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    preconditioner_update_probability: ScalarOrSchedule = _LESS_OFTEN,
    max_size_triangular: int = 8192,
    min_ndim_triangular: int = 2,
    preconditioner_lr: Scalar = 0.1,
    preconditioner_init_scale: Scalar = 1.0,
    damping: Scalar = 1e-9,
    mu_dtype: torch.dtype | None = None,
    key: Tensor | None = None,
    max_rms: Scalar = 1.1,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn = None,
) -> GradientTransformationExtraArgs:
    """PSGD Kron: `scale_by_kron`, each leaf bounded to a root mean square of `max_rms`, and decoupled weight decay.

    Source: Pooladzandi and Li 2024 (arXiv:2402.04553).

    >>> params, optimizer = torch.zeros(4, 3), ft.optim.kron(0.1)
    >>> updates, state = optimizer.update(torch.full((4, 3), 100.0), optimizer.init(params), params)
    >>> round(updates.square().mean().sqrt().item(), 4)  # at most 0.1 * 1.1
    0.11
    """
    return chain(
        scale_by_kron(
            b1,
            preconditioner_update_probability,
            max_size_triangular,
            min_ndim_triangular,
            preconditioner_lr,
            preconditioner_init_scale,
            damping,
            mu_dtype,
            key,
        ),
        clip_by_block_rms(max_rms),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


def _at_least_1d(x: Tensor) -> Tensor:
    return x.reshape(1) if x.dim() == 0 else x


def _start(p: Tensor, dim: int, min_ndim: int, largest: int, scale: Scalar) -> Tensor:
    ones = torch.ones_like(precise(p.new_empty(p.shape[dim])))
    one = torch.diag(ones) if p.dim() >= min_ndim and 1 < len(ones) <= largest else ones
    # the product of all factors has the scale
    return one * (like(scale, one) ** (1 / p.dim()))


def _preconditioned(x: Tensor, factors: list[Tensor]) -> Tensor:
    for dim, q in enumerate(factors):
        x = multiply(q, x, dim)
    for dim, q in enumerate(factors):
        x = multiply(q.mT if q.dim() == 2 else q, x, dim)
    return x


def _learned(x: Tensor, v: Tensor, factors: list[Tensor], lr: Scalar) -> list[Tensor]:
    """Return the factors after one step down along the relative gradient, of one size."""
    if x.numel() == 0:
        return factors
    a, b = x, v  # to be Q x and Q⁻ᵀ v
    for dim, q in enumerate(factors):
        a, b = multiply(q, a, dim), _divided(b, q, dim)
    a, b = shrunk(a, length(a)), shrunk(b, length(b))
    new = [_descended(q, a, b, dim, lr) for dim, q in enumerate(factors)]
    # P does not change by it, but no factor may run away from the others
    sizes = torch.stack([q.abs().amax() for q in new])
    mean = sizes.log().mean().exp()
    return [q * (mean / size) for q, size in zip(new, sizes.unbind(), strict=True)]


def _divided(x: Tensor, q: Tensor, dim: int) -> Tensor:
    if q.dim() == 1:
        return multiply(1 / q, x, dim)
    moved = x.movedim(dim, 0)
    solved = torch.linalg.solve_triangular(q.mT, unfold(x, dim), upper=False)
    return solved.reshape(moved.shape).movedim(0, dim)


def _descended(q: Tensor, a: Tensor, b: Tensor, dim: int, lr: Scalar) -> Tensor:
    if q.dim() == 1:
        one, two = (unfold(x * x, dim).sum(1) for x in (a, b))
        return q - like(lr, q) / (one + two).amax() * (one - two) * q
    one, two = gram(a, dim), gram(b, dim)
    return q - like(lr, q) / _norm_bound(one + two) * torch.triu(one - two) @ q


def _norm_bound(matrix: Tensor) -> Tensor:
    """Return a lower bound of the largest eigenvalue of a positive matrix: two iterations from the largest column."""
    x = matrix.index_select(1, length(matrix, lambda squares: torch.sum(squares, 0)).argmax(keepdim=True)).squeeze(1)
    y = matrix @ (x / length(x))
    return length(matrix @ (y / length(y)))
