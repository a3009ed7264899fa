"""Arithmetic on one leaf, and on the numbers that all leaves share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.schedules import Scalar
from functrain.schedules.schedule import check_number
from functrain.tree import Tree
from functrain.tree.reductions import length, real_dtype, wide
from functrain.tree.reductions import working_dtype as working_dtype
from functrain.tree.reusing import over


def like(value: Scalar, leaf: Tensor) -> Scalar:
    """Return a hyper-parameter in the dtype of a leaf; a float passes.

    A () float32 tensor would turn a () bfloat16 leaf into float32.
    """
    return value.to(leaf.dtype) if isinstance(value, Tensor) else check_number("a hyper-parameter", value)


def lerp(old: Tensor, new: Tensor, weight: Scalar) -> Tensor:
    """Return (1 - weight) * old + weight * new, in the wider dtype of the two and one pass over memory."""
    dtype = torch.promote_types(old.dtype, new.dtype)
    return torch.lerp(old.to(dtype), new.to(dtype), weight.to(dtype) if isinstance(weight, Tensor) else weight)


def lerp_over(old: Tensor, fresh: Tensor, weight: Scalar) -> Tensor:
    """Return `lerp(old, fresh, weight)` of a `fresh` that nobody reads afterwards, such as a square."""
    if fresh.dtype != torch.promote_types(old.dtype, fresh.dtype):
        return lerp(old, fresh, weight)
    share = weight.to(fresh.dtype) if isinstance(weight, Tensor) else weight
    return over(fresh, torch.lerp, old.to(fresh.dtype), fresh, share)


def plus(x: Tensor, eps: Scalar) -> Tensor:
    """Return x + eps, without a pass over memory where eps is the float 0."""
    return x if isinstance(eps, (int, float)) and eps == 0 else x + like(eps, x)


def add_scaled(x: Tensor, scale: Scalar, y: Tensor) -> Tensor:
    """Return x + scale * y."""
    if isinstance(scale, Tensor):
        return x + like(scale, y) * y
    return torch.add(x, y, alpha=check_number("a hyper-parameter", scale))


def clamp(x: Tensor, low: Scalar, high: Scalar) -> Tensor:
    """Return x, not below `low` and not above `high`.

    >>> clamp(torch.tensor([-3.0, 0.5]), -1.0, 1.0)
    tensor([-1.0000,  0.5000])
    """
    bounds: Any = like(low, x), like(high, x)
    if isinstance(bounds[0], Tensor) == isinstance(bounds[1], Tensor):
        return torch.clamp(x, *bounds)
    return torch.clamp(torch.clamp(x, min=bounds[0]), max=bounds[1])


def scalar(value: Scalar, updates: Tree) -> Scalar:
    """Return a number shared by all leaves, cast once to `working_dtype`; a float passes."""
    return value.to(working_dtype(updates)) if isinstance(value, Tensor) else check_number("a hyper-parameter", value)


def device_of(params: Tree) -> torch.device:
    """Return the device of the first tensor of a tree, the CPU when there is none."""
    return next((leaf.device for leaf in tree.leaves(params) if isinstance(leaf, Tensor)), torch.device("cpu"))


def zero_count(params: Tree) -> Tensor:
    """Return a counter at zero, () int64, on the device of the params.

    >>> zero_count({"w": torch.ones(2)})
    tensor(0)
    """
    return torch.zeros((), dtype=torch.int64, device=device_of(params))


def safe_increment(count: Tensor) -> Tensor:
    """Return count + 1, and the largest value of its dtype once that is reached.

    >>> ft.optim.safe_increment(torch.tensor(2)), ft.optim.safe_increment(torch.tensor(127, dtype=torch.int8))
    (tensor(3), tensor(127, dtype=torch.int8))
    """
    info: Any = torch.finfo(count.dtype) if count.dtype.is_floating_point else torch.iinfo(count.dtype)
    return torch.where(count < info.max, count + 1, count)


# Of no larger numbers 65,000 squares can be added, or one be multiplied by as much.
_LARGEST_SQUARED = {torch.float32: 2.0**56, torch.float64: 2.0**504}


def largest_squared(x: Tensor) -> float:
    """Return the largest number of a real tensor's dtype that is squared: 2**56 in float32."""
    return _LARGEST_SQUARED[x.dtype]


def squarable(x: Tensor) -> Tensor:
    """Return x with no element larger than has a square: one of 1e20 in float32 becomes 2**56, as a clip would do.

    What is not finite becomes NaN, to be seen.
    """
    if x.is_complex():
        return torch.complex(squarable(x.real), squarable(x.imag))
    return within(x, largest_squared(x))


def shrunk(x: Tensor, norm: Tensor) -> Tensor:
    """Return x, or x scaled down as far as makes the square of `norm`, its own or that of its tree, a number."""
    largest = largest_squared(norm)
    # bits stay: times 1 where there is nothing to do
    return x * torch.where(norm > largest, largest / norm, 1.0).to(x.dtype)


def within(x: Tensor, largest: float) -> Tensor:
    """Return real x clipped to +-largest; what is not finite becomes NaN, to be seen."""
    clipped = torch.clamp(x, -largest, largest)
    return over(clipped, torch.add, clipped, x, alpha=0)  # 0 * inf is NaN


def above_zero(x: Tensor) -> Tensor:
    """Return max(x, the smallest normal number): roots and inverses are finite there, and so are their derivatives.

    The derivative where x is less is 0: a moment of a unit whose gradients are all 0 moves nothing.
    """
    return x if x.is_complex() else torch.clamp(x, min=torch.finfo(x.dtype).tiny)


def over_root(x: Tensor, square: Tensor, eps: Scalar, eps_root: Scalar) -> Tensor:
    """Return x / (sqrt(square + eps_root) + eps), of two results that nobody reads afterwards."""
    if isinstance(eps, (int, float)) and isinstance(eps_root, (int, float)) and not square.is_complex():
        square = square if eps_root == 0 else over(square, torch.add, square, eps_root)
        square = over(square, torch.clamp, square, min=torch.finfo(square.dtype).tiny)
        root = over(square, torch.sqrt, square)
        root = root if eps == 0 else over(root, torch.add, root, eps)
    else:
        root = plus(torch.sqrt(above_zero(plus(square, eps_root))), eps)
    return over(x, torch.div, x, root) if x.dtype == root.dtype else x / root


def squared(fresh: Tensor) -> Tensor:
    """Return the square of a real tensor that nobody reads afterwards."""
    return over(fresh, torch.mul, fresh, fresh)


def abs_sq(x: Tensor) -> Tensor:
    """Return |x|², real also where x is complex."""
    return x.real * x.real + x.imag * x.imag if x.is_complex() else x * x


def scaled(g: Tensor, factor: Tensor) -> Tensor:
    """Return factor * g, computed in float32 at least: a factor of 1e-20 is 0 in float16."""
    return (factor.to(real_dtype(torch.promote_types(g.dtype, torch.float32))) * wide(g)).to(g.dtype)


def safe_norm(x: Tensor, min_norm: Scalar) -> Tensor:
    """Return max(‖x‖, min_norm), (), with a gradient of zero where the bound holds and the plain one may be NaN.

    >>> ft.optim.safe_norm(torch.zeros(2), min_norm=1e-3), ft.optim.safe_norm(torch.tensor([3.0, 4.0]), 1e-3)
    (tensor(0.0010), tensor(5.))
    >>> ft.grad(lambda x: ft.optim.safe_norm(x, 1e-3))(torch.zeros(2))
    tensor([0., 0.])
    """
    return _at_least(length(x), min_norm).to(real_dtype(x.dtype))


def safe_root_mean_squares(x: Tensor, min_rms: Scalar) -> Tensor:
    """Return max(rms(x), min_rms), (), with a gradient of zero where the bound holds.

    >>> ft.optim.safe_root_mean_squares(torch.tensor([1.0, 7.0]), min_rms=1e-3)
    tensor(5.)
    """
    return _at_least(length(x, torch.mean), min_rms).to(real_dtype(x.dtype))


def _at_least(size: Tensor, floor: Scalar) -> Tensor:
    return torch.where(size <= like(floor, size), like(floor, size), size)
