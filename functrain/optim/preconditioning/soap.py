"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.combining import chain
from functrain.optim.decay import add_decayed_weights
from functrain.optim.masking import MaskOrFn
from functrain.optim.numerics.leafwise import leafwise
from functrain.optim.numerics.looping import when
from functrain.optim.numerics.moments import debias, zero_moments
from functrain.optim.numerics.safe import above_zero, abs_sq, lerp, like, plus, shrunk, working_dtype, zero_count
from functrain.optim.preconditioning.factors import gram, group, multiply, precise
from functrain.optim.scaling import scale_by_learning_rate
from functrain.optim.transformation import GradientTransformation, GradientTransformationExtraArgs, Updates, check_real
from functrain.schedules import Scalar, ScalarOrSchedule
from functrain.tree import Params, Tree
from functrain.tree.reductions import length


class ScaleBySoapState(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far
    mu: Tree  # like params: first moment
    nu: Tree  # like params: second moment, in the eigenbasis
    covariance: Tree  # for each leaf, a tuple of (n, n) for each dimension: average of gram matrices; (0, 0) if plain
    basis: Tree  # like covariance: its eigenvectors, in columns


def scale_by_soap(
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    shampoo_beta: Scalar | None = None,
    precondition_frequency: int | Tensor = 10,
    max_precond_dim: int = 10000,
) -> GradientTransformation:
    """Rescale updates as Adam does, in the basis of the eigenvectors of their covariance along each dimension.

    Covariances are averaged with `shampoo_beta`, `b2` if None, at each update. Eigenvectors are made by `eigh` at the
    first update, and follow by one power iteration and a QR decomposition every `precondition_frequency` updates:
    eagerly at those only, vmapped or compiled at each. The first update is 0, as in the authors' code: so no gradient
    is seen in a basis made of itself. A dimension of size 1 or above `max_precond_dim` is left as it is, and so are
    leaves with fewer than two dimensions: for them it equals `scale_by_adam`, one update later.

    Source: Vyas et al. 2024 (arXiv:2409.11321), algorithms 3 and 4.

    Raises: TypeError naming the leaf that is complex.

    >>> tx, grads = ft.optim.scale_by_soap(), torch.diag(torch.tensor([3.0, -0.5]))
    >>> first, state = tx.update(grads, tx.init(torch.zeros(2, 2)))
    >>> first.diagonal(), tx.update(grads, state)[0].diagonal().round(decimals=3)
    (tensor([0., 0.]), tensor([ 1., -1.]))
    """
    covariance_decay = b2 if shampoo_beta is None else shampoo_beta

    def init(params: Params) -> ScaleBySoapState:
        check_real(params, "scale_by_soap")
        leaves, structure = tree.flatten(params)
        sizes = [[_rotated_size(p, dim, max_precond_dim) for dim in range(p.dim())] for p in leaves]
        empty = [tuple(precise(p.new_zeros(n, n)) for n in row) for p, row in zip(leaves, sizes, strict=True)]
        eyes = [tuple(torch.eye(len(c), dtype=c.dtype, device=c.device) for c in row) for row in empty]
        return ScaleBySoapState(
            zero_count(params),
            zero_moments(params),
            zero_moments(params),
            tree.unflatten(structure, empty),
            tree.unflatten(structure, eyes),
        )

    def update(
        updates: Updates, state: ScaleBySoapState, params: Params | None = None
    ) -> tuple[Updates, ScaleBySoapState]:
        # moments stay 0 at the first update, and so does what is made of them
        started = (state.count > 0).to(working_dtype(updates))
        corrections = torch.clamp(state.count, min=1)
        unstarted = 1 - started  # under the root in place of 0, where its slope would be infinite
        mu_factor, nu_factor = debias(b1, corrections, updates), debias(b2, corrections, updates)
        bases = group(tree.leaves(state.basis), updates)
        rows = iter(bases)

        def step(g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            basis, g = next(rows), shrunk(g, length(g))
            m = lerp(m, g, started * (1 - b1))
            v = lerp(v, abs_sq(_rotated(g, basis)), started * (1 - b2))
            mu_hat, nu_hat = like(mu_factor, m) * _rotated(m, basis), like(nu_factor, v) * v + like(unstarted, v)
            new = _rotated_back(mu_hat / plus(torch.sqrt(above_zero(nu_hat)), eps), basis)
            return new, m, v

        new, (mu, nu) = leafwise(step, updates, (state.mu, state.nu))
        grads = [shrunk(g, length(g)) for g in map(precise, tree.leaves(updates))]
        covariances = [
            [lerp(c, gram(g, dim), 1 - covariance_decay) if len(c) else c for dim, c in enumerate(row)]
            for g, row in zip(grads, group(tree.leaves(state.covariance), updates), strict=True)
        ]
        basis = [q for row in bases for q in row]
        flat = [c for row in covariances for c in row]
        basis = when(state.count == 0, lambda _: [_eigenvectors(c) for c in flat], basis)
        due = (state.count > 0) & (state.count % precondition_frequency == 0)
        basis = when(due, lambda old: [_power_iteration(c, q) for c, q in zip(flat, old, strict=True)], basis)
        return new, ScaleBySoapState(
            state.count + 1,
            mu,
            nu,
            tree.unflatten(tree.structure(state.covariance), flat),
            tree.unflatten(tree.structure(state.basis), basis),
        )

    return GradientTransformation(init, update)


def soap(
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    eps: Scalar = 1e-8,
    shampoo_beta: Scalar | None = None,
    precondition_frequency: int | Tensor = 10,
    max_precond_dim: int = 10000,
    weight_decay: ScalarOrSchedule = 0.01,
    mask: MaskOrFn = None,
) -> GradientTransformationExtraArgs:
    """SOAP: `scale_by_soap`, with decoupled weight decay.

    Source: Vyas et al. 2024 (arXiv:2409.11321), algorithm 3.

    >>> params, optimizer = torch.zeros(2, 2), ft.optim.soap(0.1)
    >>> _, state = optimizer.update(torch.ones(2, 2), optimizer.init(params), params)
    >>> optimizer.update(torch.ones(2, 2), state, params)[0].round(decimals=3)
    tensor([[-0.0500, -0.0500],
            [-0.0500, -0.0500]])
    """
    return chain(
        scale_by_soap(b1, b2, eps, shampoo_beta, precondition_frequency, max_precond_dim),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


def _rotated_size(p: Tensor, dim: int, largest: int) -> int:
    return p.shape[dim] if p.dim() > 1 and 1 < p.shape[dim] <= largest else 0


def _rotated(x: Tensor, basis: list[Tensor]) -> Tensor:
    for dim, q in enumerate(basis):
        x = multiply(q.mH, x.to(q.dtype), dim) if len(q) else x
    return x


def _rotated_back(x: Tensor, basis: list[Tensor]) -> Tensor:
    for dim, q in enumerate(basis):
        x = multiply(q, x, dim) if len(q) else x
    return x


def _eigenvectors(covariance: Tensor) -> Tensor:
    # largest first: the order to which power iterations with QR lead
    # contiguous, as init made them: for a state with other strides a compiled step compiles again
    return torch.linalg.eigh(covariance).eigenvectors.flip(-1).contiguous() if len(covariance) else covariance


def _power_iteration(covariance: Tensor, basis: Tensor) -> Tensor:
    return torch.linalg.qr(covariance @ basis).Q.contiguous() if len(covariance) else basis
