"""Running averages of updates and of their powers, with optax's names."""

from __future__ import annotations

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.numerics.safe import abs_sq, lerp, like, working_dtype
from functrain.optim.transformation import Updates, check_trainable
from functrain.schedules import Scalar
from functrain.tree import Params, Tree
from functrain.tree.reductions import wide


def zero_moments(params: Params, dtype: torch.dtype | None = None) -> Tree:
    """Return zeros like params, in `accumulator_dtype` of each and `dtype`: of float16 params in float32.

    Raises: TypeError naming the leaf that is no floating-point tensor.
    """
    check_trainable(params)
    return tree.map(lambda p: torch.zeros_like(p, dtype=accumulator_dtype(p, dtype)), params)


def accumulator_dtype(param: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of what is gathered for a parameter: `dtype` where one is given.

    What is gathered for a complex or a float64 parameter stays so: a real or a short number would lose its imaginary
    part, or be infinite at 1e300.
    """
    if dtype is not None and (param.is_complex() or param.dtype == torch.float64):
        return torch.promote_types(param.dtype, dtype)
    return dtype or moment_dtype(param)


def moment_dtype(leaf: Tensor) -> torch.dtype:
    """Return the dtype in which a moment of this leaf is kept: the leaf's own, for float16 float32.

    A second moment of float16 would be 0 for gradients below 1e-4 and infinite for those above 256. bfloat16 has the
    range of float32, and half of its memory.
    """
    return torch.float32 if leaf.dtype == torch.float16 else leaf.dtype


def full_moments(params: Params, value: Scalar) -> Tree:
    """Return a tree like params filled with `value`, which may be a () tensor."""
    return tree.map(lambda zero: zero + like(value, zero), zero_moments(params))


def full_parts(params: Params, value: Scalar) -> Tree:
    """Return a tree like params filled with `value`, in both parts of a complex leaf: for steps `by_parts`."""
    return tree.map(
        lambda full: torch.complex(full.real, full.real) if full.is_complex() else full, full_moments(params, value)
    )


def update_moment(updates: Updates, moments: Tree, decay: Scalar, order: int) -> Tree:
    """Return (1 - decay) * updates ** order + decay * moments.

    >>> ft.optim.update_moment(torch.tensor([3.0]), torch.tensor([1.0]), decay=0.9, order=2)
    tensor([1.8000])
    """
    return tree.map(lambda g, t: _moved(t, _power(wide(g), order), 1 - decay, g), updates, moments, by_kind=True)


def update_moment_per_elem_norm(updates: Updates, moments: Tree, decay: Scalar, order: int) -> Tree:
    """Return (1 - decay) * |updates| ** order + decay * moments, for an even order.

    Equals `update_moment` where updates are real.

    >>> ft.optim.update_moment_per_elem_norm(torch.tensor([3.0 + 4.0j]), torch.tensor([1.0]), decay=0.9, order=2)
    tensor([3.4000])
    """
    return tree.map(
        lambda g, t: _moved(t, _power(abs_sq(wide(g)), order // 2), 1 - decay, g), updates, moments, by_kind=True
    )


def update_infinity_moment(updates: Updates, moments: Tree, decay: Scalar, eps: Scalar) -> Tree:
    """Return max(|updates| + eps, decay * moments).

    >>> ft.optim.update_infinity_moment(torch.tensor([-3.0, 1.0]), torch.tensor([2.0, 2.0]), decay=0.9, eps=0.0)
    tensor([3.0000, 1.8000])
    """
    return tree.map(
        lambda g, t: torch.maximum(torch.abs(g) + like(eps, g), like(decay, t) * t), updates, moments, by_kind=True
    )


def bias_correction(moment: Tree, decay: Scalar, count: Tensor) -> Tree:
    """Return moment / (1 - decay ** count): what the average would be, had it not started at zero.

    >>> ft.optim.bias_correction(torch.tensor([0.05, 0.2]), decay=0.9, count=torch.tensor(1))
    tensor([0.5000, 2.0000])
    """
    factor = debias(decay, count, moment)
    return tree.map(lambda t: like(factor, t) * t, moment, by_kind=True)


def debias(decay: Scalar, count: Tensor, updates: Updates) -> Tensor:
    """Return 1 / (1 - decay ** count), the factor of `bias_correction`: one () tensor for all leaves."""
    dtype = working_dtype(updates)
    base = decay.to(dtype) if isinstance(decay, Tensor) else decay
    return 1 / (1 - base ** count.to(dtype))


def nesterov_factors(b1: Scalar, count: Tensor, updates: Updates, nesterov: bool) -> tuple[Scalar, Scalar]:
    """Return (a, b) such that a * mu + b * updates is the first moment corrected for its start at zero.

    With `nesterov`, it is the moment that one more update like this would make.

    Source: Dozat 2016, algorithm 2.
    """
    now = debias(b1, count, updates)
    return (b1 * debias(b1, count + 1, updates), (1 - b1) * now) if nesterov else (now, 0.0)


def _moved(moment: Tensor, power: Tensor, weight: Scalar, g: Tensor) -> Tensor:
    new = lerp(moment, power, weight)
    return new.to(moment.dtype) if g.dtype == moment.dtype else new


def _power(x: Tensor, order: int) -> Tensor:
    return x if order == 1 else x**order
