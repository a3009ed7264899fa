"""Muon: momentum made orthogonal, for matrices; AdamW for the rest."""

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
from functrain.optim.numerics.leafwise import leafwise
from functrain.optim.numerics.moments import nesterov_factors, zero_moments
from functrain.optim.numerics.safe import (
    add_scaled,
    device_of,
    lerp,
    like,
    scaled,
    working_dtype,
    zero_count,
)
from functrain.optim.optimizers.adam import adamw
from functrain.optim.partitioning import partition
from functrain.optim.preconditioning.newton_schulz import (
    MuonDimensionNumbers,
    Preconditioning,
    dims_of,
    orthogonalize_all,
)
from functrain.optim.scaling import scale_by_learning_rate
from functrain.optim.transformation import (
    EmptyState,
    GradientTransformation,
    GradientTransformationExtraArgs,
    Updates,
    init_empty_state,
)
from functrain.schedules import Scalar, ScalarOrSchedule
from functrain.tree import Params, Tree
from functrain.tree.reductions import wide

# MuonDimensionNumbers for all leaves, a tree of them with None where Muon is not to be used, or what makes such a tree
WeightDimNumOrFn: TypeAlias = MuonDimensionNumbers | Tree | Callable[[Params], Tree]
Coefficients: TypeAlias = Sequence[Any]  # three numbers for all steps, or three for each

_STANDARD = (3.4445, -4.7750, 2.0315)
_DION = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


class MuonState(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far
    mu: Tree  # like params, in mu_dtype if given: first moment
    ns_coeffs: Tensor  # (3,), or (ns_steps, 3)


def scale_by_muon(
    ns_coeffs: Coefficients = _STANDARD,
    ns_steps: int = 5,
    beta: Scalar = 0.95,
    eps: Scalar = 1e-8,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: Preconditioning = "frobenius",
    weight_dimension_numbers: WeightDimNumOrFn | None = None,
) -> GradientTransformation:
    """Replace each matrix of first moments by the nearest orthogonal one, nearly, by Newton-Schulz steps.

    `adaptive` multiplies it by its inner product with the moment.

    Source: Jordan et al. 2024, Muon; Bernstein and Newhouse 2024 (arXiv:2409.20325) for `adaptive`.

    Raises: ValueError for coefficients of another shape, and for leaves that are no matrices without dimension numbers.

    >>> tx = ft.optim.scale_by_muon()
    >>> updates, _ = tx.update(torch.diag(torch.tensor([5.0, 0.5])), tx.init(torch.zeros(2, 2)))
    >>> [round(value, 1) for value in torch.linalg.svdvals(updates).tolist()]
    [0.7, 0.7]
    """
    shape = torch.tensor(ns_coeffs).shape
    if len(shape) not in (1, 2) or shape[-1] != 3:
        raise ValueError(f"scale_by_muon: ns_coeffs must be (3,) or (n, 3), came {tuple(shape)}")
    if len(shape) == 2 and shape[0] > ns_steps:
        raise ValueError(f"scale_by_muon: {shape[0]} rows of ns_coeffs are more than ns_steps={ns_steps}")

    def init(params: Params) -> MuonState:
        coefficients = torch.tensor(ns_coeffs, dtype=working_dtype(params), device=device_of(params))
        return MuonState(zero_count(params), zero_moments(params, mu_dtype), coefficients)

    def update(updates: Updates, state: MuonState, params: Params | None = None) -> tuple[Updates, MuonState]:
        count = state.count + 1
        mu_factor, now_factor = nesterov_factors(beta, count, updates, nesterov)

        def average(g: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
            m = lerp(m, g, 1 - beta)
            mu_hat = like(mu_factor, m) * m
            return add_scaled(mu_hat, now_factor, g) if nesterov else mu_hat, m

        averages, (mu,) = leafwise(average, updates, (state.mu,))
        leaves, structure = tree.flatten(averages)
        numbers = _numbers(weight_dimension_numbers, averages)
        new = orthogonalize_all(leaves, numbers, state.ns_coeffs, ns_steps, preconditioning, eps)
        if adaptive:
            new = [
                scaled(leaf, torch.sum(wide(old).conj() * wide(leaf))) for old, leaf in zip(leaves, new, strict=True)
            ]
        return tree.unflatten(structure, new), MuonState(count, mu, state.ns_coeffs)

    return GradientTransformation(init, update)


def scale_by_shape(
    weight_dimension_numbers: WeightDimNumOrFn | None = None, consistent_rms: Scalar | None = None
) -> GradientTransformation:
    """Multiply each update by sqrt(max(1, outputs / inputs)).

    With `consistent_rms`, by sqrt(max(inputs, outputs)) times that: it becomes the root mean square of the update.

    Source: Bernstein 2025, "Deriving Muon"; Liu et al. 2025 (arXiv:2502.16982), section 2.2.

    >>> tx, params = ft.optim.scale_by_shape(), torch.zeros(2, 8)
    >>> tx.update(torch.ones(2, 8), tx.init(params))[0]
    tensor([[2., 2., 2., 2., 2., 2., 2., 2.],
            [2., 2., 2., 2., 2., 2., 2., 2.]])
    """

    def rescale(g: Tensor, numbers: MuonDimensionNumbers | None) -> Tensor:
        if g.numel() == 0:
            return g
        inputs, outputs = [
            math.prod([g.shape[dim] for dim in dims]) for dims in dims_of(g, numbers or MuonDimensionNumbers())
        ]
        if consistent_rms is None:
            return math.sqrt(max(1, outputs / inputs)) * g
        return like(math.sqrt(max(inputs, outputs)) * consistent_rms, g) * g

    def update(updates: Updates, state: EmptyState, params: Params | None = None) -> tuple[Updates, EmptyState]:
        numbers = iter(_numbers(weight_dimension_numbers, updates))
        return tree.map(lambda g: rescale(g, next(numbers)), updates), state

    return GradientTransformation(init_empty_state, update)


def muon(
    learning_rate: ScalarOrSchedule,
    ns_coeffs: Coefficients | str = _STANDARD,
    ns_steps: int = 5,
    beta: Scalar = 0.95,
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: MaskOrFn = None,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: Preconditioning = "frobenius",
    adam_b1: Scalar = 0.9,
    adam_b2: Scalar = 0.999,
    adam_eps_root: Scalar = 0.0,
    adam_weight_decay: ScalarOrSchedule = 0.0,
    adam_learning_rate: ScalarOrSchedule | None = None,
    muon_weight_dimension_numbers: WeightDimNumOrFn | None = None,
    consistent_rms: Scalar | None = None,
) -> GradientTransformationExtraArgs:
    """Muon for matrices, or for what has dimension numbers if given, and AdamW for the rest.

    `ns_coeffs` is "standard", "dion", or the numbers. Source: Jordan et al. 2024, Muon.

    >>> params, optimizer = {"w": torch.zeros(2, 2), "b": torch.zeros(2)}, ft.optim.muon(0.1)
    >>> grads = {"w": torch.diag(torch.tensor([5.0, 0.5])), "b": torch.tensor([3.0, -0.5])}
    >>> updates, state = optimizer.update(grads, optimizer.init(params), params)
    >>> updates["w"].diagonal().round(decimals=2), updates["b"]
    (tensor([-0.0700, -0.0700]), tensor([-0.1474,  0.1474]))
    """
    presets = {"standard": _STANDARD, "dion": _DION}
    if isinstance(ns_coeffs, str) and ns_coeffs not in presets:
        raise ValueError(f"muon: ns_coeffs must be one of {sorted(presets)} or numbers, came {ns_coeffs!r}")
    coefficients = presets[ns_coeffs] if isinstance(ns_coeffs, str) else ns_coeffs
    spec = muon_weight_dimension_numbers

    def labels(params: Params) -> Tree:
        if spec is None:
            return tree.map(lambda p: "muon" if p.dim() == 2 else "adam", params)
        names = iter(["adam" if numbers is None else "muon" for numbers in _numbers(spec, params)])
        return tree.map(lambda _: next(names), params)

    matrices = chain(
        scale_by_muon(
            coefficients,
            ns_steps,
            beta,
            eps,
            mu_dtype,
            nesterov=nesterov,
            adaptive=adaptive,
            preconditioning=preconditioning,
            weight_dimension_numbers=spec,
        ),
        scale_by_shape(spec, consistent_rms),
        add_decayed_weights(weight_decay, weight_decay_mask),
        scale_by_learning_rate(learning_rate),
    )
    rest = adamw(
        learning_rate if adam_learning_rate is None else adam_learning_rate,
        adam_b1,
        adam_b2,
        eps,
        adam_eps_root,
        mu_dtype,
        adam_weight_decay,
        nesterov=nesterov,
    )
    return partition({"muon": matrices, "adam": rest}, labels)


def _numbers(spec: WeightDimNumOrFn | None, updates: Updates) -> list[MuonDimensionNumbers | None]:
    """Return the dimension numbers of each leaf: those at its path, or above it."""
    found = made_for(spec, updates)
    return [_numbers_at(found, path) for path in tree.paths(updates)]


def _numbers_at(spec: Tree, path: str) -> MuonDimensionNumbers | None:
    for name in path.split("/") if path else []:
        if spec is None or isinstance(spec, MuonDimensionNumbers):
            break
        spec = tree.at(spec, name)
    return spec
