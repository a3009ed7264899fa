"""Running averages of updates and of their powers, with optax's names."""

from __future__ import annotations

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.numerics import abs_sq, like, working_dtype
from functrain.optim.transformation import Updates, check_trainable
from functrain.schedules import Scalar
from functrain.tree import Params, Tree


def zero_moments(params: Params, dtype: torch.dtype | None = None) -> Tree:
    """Return zeros like params, in `dtype` if given.

    Raises: TypeError naming the leaf that is no floating-point tensor.
    """
    check_trainable(params)
    return tree.zeros_like(params, dtype)


def full_moments(params: Params, value: Scalar) -> Tree:
    """Return a tree like params filled with `value`, which may be a () tensor."""
    return tree.map(lambda zero: zero + like(value, zero), zero_moments(params))


def update_moment(updates: Updates, moments: Tree, decay: Scalar, order: int) -> Tree:
    """Return (1 - decay) * updates ** order + decay * moments."""
    rest = 1 - decay
    return tree.map(lambda g, t: like(rest, g) * _power(g, order) + like(decay, t) * t, updates, moments)


def update_moment_per_elem_norm(updates: Updates, moments: Tree, decay: Scalar, order: int) -> Tree:
    """Return (1 - decay) * |updates| ** order + decay * moments, for an even order.

    Equals `update_moment` where updates are real.
    """
    rest, half = 1 - decay, order // 2
    return tree.map(lambda g, t: like(rest, g) * _power(abs_sq(g), half) + like(decay, t) * t, updates, moments)


def update_infinity_moment(updates: Updates, moments: Tree, decay: Scalar, eps: Scalar) -> Tree:
    """Return max(|updates| + eps, decay * moments)."""
    return tree.map(lambda g, t: torch.maximum(torch.abs(g) + like(eps, g), like(decay, t) * t), updates, moments)


def bias_correction(moment: Tree, decay: Scalar, count: Tensor) -> Tree:
    """Return moment / (1 - decay ** count): what the average would be, had it not started at zero."""
    factor = debias(decay, count, moment)
    return tree.map(lambda t: like(factor, t) * t, moment)


def debias(decay: Scalar, count: Tensor, updates: Updates) -> Tensor:
    """Return 1 / (1 - decay ** count), the factor of `bias_correction`, one () tensor for all leaves."""
    dtype = working_dtype(updates)
    base = decay.to(dtype) if isinstance(decay, Tensor) else decay
    return 1 / (1 - base ** count.to(dtype))


def unbiased_mean(mu: Tree, updates: Updates, b1: Scalar, count: Tensor, *, nesterov: bool) -> Tree:
    """Return the first moment corrected for its start at zero; with `nesterov`, as one more update like this makes it.

    Source: Dozat 2016, algorithm 2.
    """
    if not nesterov:
        return bias_correction(mu, b1, count)
    ahead, now = b1 * debias(b1, count + 1, updates), (1 - b1) * debias(b1, count, updates)
    return tree.map(lambda m, g: like(ahead, m) * m + like(now, g) * g, mu, updates)


def cast(moments: Tree, dtype: torch.dtype | None) -> Tree:
    """Return moments in `dtype`, as they are when it is None."""
    return moments if dtype is None else tree.cast(moments, dtype)


def cast_like(moments: Tree, other: Tree) -> Tree:
    """Return moments, each in the dtype of its counterpart in `other`."""
    return tree.map(lambda t, o: t.to(o.dtype), moments, other)


def _power(x: Tensor, order: int) -> Tensor:
    return x if order == 1 else x**order
