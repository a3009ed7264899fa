"""Moments in half the memory: bfloat16, rounded up or down at random, so that they are right on average."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import functrain.random as random
import functrain.tree as tree
from functrain.optim.numerics.safe import device_of, working_dtype
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    OptState,
    Updates,
    with_extra_args_support,
)
from functrain.tree import Params, Tree


class RoundedState(NamedTuple):
    key: Tensor  # (2,), int32: the next key
    inner_state: OptState  # that of inner, its floating-point tensors bfloat16 but for () ones


def round_state_stochastically(
    inner: GradientTransformation, key: Tensor | None = None
) -> GradientTransformationExtraArgs:
    """Keep the state of `inner` in bfloat16, and let it compute in float32, or float64 where updates are.

    Each number is rounded up with the probability of how far it has come from the one below, so that the mean is the
    number itself. To the nearest, a second moment with b2 = 0.999 would stop: a change of 0.001 is less than half of
    the 2**-7 between two of bfloat16. Updates keep their dtype, () tensors such as counts and rates theirs. The
    derivative is that of the mean, 1. A leaf draws by its number among those of the state.

    Source: Gupta et al. 2015 (arXiv:1502.02551), section 3; Zamirai et al. 2020 (arXiv:2010.06192).

    >>> optimizer = ft.optim.round_state_stochastically(ft.optim.adam(1e-3), key=ft.random.key(0))
    >>> state = optimizer.init({"w": torch.zeros(2)})
    >>> ft.tree.get(state, "mu")["w"].dtype
    torch.bfloat16
    """
    inner = with_extra_args_support(inner)

    def init(params: Params) -> RoundedState:
        start = (random.key(0) if key is None else key.clone()).to(device_of(params))
        next_key, noise = random.split(start).unbind()
        return RoundedState(next_key, _rounded(inner.init(params), noise))

    def update(
        updates: Updates, state: RoundedState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, RoundedState]:
        dtype = working_dtype(updates)
        next_key, noise = random.split(state.key).unbind()
        wide = tree.map(lambda x: x.to(dtype) if _is_kept_small(x) else x, state.inner_state)
        new, inner_state = inner.update(updates, wide, params, **extra_args)
        return tree.cast_like(new, updates), RoundedState(next_key, _rounded(inner_state, noise))

    return GradientTransformationExtraArgs(init, update)


def round_stochastically(x: Tensor, key: Tensor) -> Tensor:
    """Return x in bfloat16: one of its two neighbours there, with probabilities that make the mean x.

    What is not finite stays, and so does what has no neighbour above. The derivative is that of the mean, 1.

    >>> x = torch.full((10000,), 1 + 2**-8)  # halfway from 1 to the next bfloat16
    >>> rounded = ft.optim.round_stochastically(x, ft.random.key(0))
    >>> rounded.unique(), round((rounded > 1).float().mean().item(), 1)
    (tensor([1.0000, 1.0078], dtype=torch.bfloat16), 0.5)
    """
    return round_with_bits(x, random.bits(key, x.shape))


def round_with_bits(x: Tensor, bits: Tensor) -> Tensor:
    """Do what `round_stochastically` does with a key from which these bits are drawn, int32, one for each element."""
    exact = x.to(torch.float32)
    # the upper half of a float32 is a bfloat16: 16 random bits carry into it as often as the lower half is large
    near = ((exact.view(torch.int32) + (bits & 0xFFFF)) & ~0xFFFF).view(torch.float32)
    away = torch.where(torch.isfinite(near) & torch.isfinite(exact), near - exact, 0.0)
    # x + (near - x) is near: both are multiples of the float32 unit of x, and less than a bfloat16 unit apart
    return (exact + away.detach()).to(torch.bfloat16)


def _rounded(state: Tree, key: Tensor) -> Tree:
    leaves, structure = tree.flatten(state)
    small = [i for i, x in enumerate(leaves) if _is_kept_small(x)]
    bits = random.bits_of_each(random.split(key, len(leaves))[small], [leaves[i] for i in small])
    for i, drawn in zip(small, bits, strict=True):
        leaves[i] = round_with_bits(leaves[i], drawn)
    return tree.unflatten(structure, leaves)


def _is_kept_small(x: Tensor) -> bool:
    return x.is_floating_point() and x.dim() > 0
