"""Parameters in half precision, and where the small steps go that they cannot hold.

A bfloat16 has 8 bits: to the nearest, a number takes no step below 1/512 of itself. Parameters in float32, cast where
they are used (`ft.mixed_precision`), have no such trouble, and are the simplest way. These two are for parameters that
lie in half precision: with float32 copies in the state of the optimizer, or with a rounding that is right on average.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import functrain.random as random
import functrain.tree as tree
from functrain.optim.numerics.rounding import round_with_bits
from functrain.optim.numerics.safe import device_of
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    OptState,
    Updates,
    check_params,
    with_extra_args_support,
)
from functrain.optim.updating import apply_updates
from functrain.tree import Params


class MasterCopiesState(NamedTuple):
    master: Params  # float32 copies of the half-precision params; None for the others
    inner_state: OptState  # that of inner for float32 params


def keep_master_copies(inner: GradientTransformation) -> GradientTransformationExtraArgs:
    """Let `inner` train float32 copies of half-precision params, and round these to the params after each step.

    Equals `inner` on float32 params, rounded to the nearest, bit for bit, given the same gradients; a number that
    shrinks to less than 2**-16 of itself in one step may be off by one unit. Leaves that are no half precision are
    trained as they are. Goes around the whole optimizer: updates are float32, the way from param to rounded copy. Who
    changes params by hand starts again with `init`.

    Source: Micikevicius et al. 2018 (arXiv:1710.03740), section 3.1.

    >>> params = torch.ones(1, dtype=torch.bfloat16)
    >>> optimizer = ft.optim.keep_master_copies(ft.optim.sgd(2**-10))
    >>> state = optimizer.init(params)
    >>> for _ in range(8):  # each step alone is too small for bfloat16
    ...     updates, state = optimizer.update(torch.ones_like(params), state, params)
    ...     params = ft.optim.apply_updates(params, updates)
    >>> params
    tensor([0.9922], dtype=torch.bfloat16)
    """
    inner = with_extra_args_support(inner)

    def init(params: Params) -> MasterCopiesState:
        wide = _wide(params)
        return MasterCopiesState(_master(params, wide), inner.init(wide))

    def update(
        updates: Updates, state: MasterCopiesState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, MasterCopiesState]:
        check_params(params, "keep_master_copies")
        wide = _wide(params, state.master)
        steps, inner_state = inner.update(tree.cast_like(updates, wide), state.inner_state, wide, **extra_args)
        new = apply_updates(wide, steps)
        ways = tree.map(lambda p, n, u: _way(p, n.to(p.dtype)) if _half(p) else u, params, new, steps, by_kind=True)
        return ways, MasterCopiesState(_master(params, new), inner_state)

    return GradientTransformationExtraArgs(init, update)


class RoundedParamsState(NamedTuple):
    key: Tensor  # (2,), int32: the next key
    inner_state: OptState  # that of inner for float32 params


def round_params_stochastically(
    inner: GradientTransformation, key: Tensor | None = None
) -> GradientTransformationExtraArgs:
    """Let `inner` take its step from bfloat16 params in float32, and round the result up or down at random.

    The mean of the new param is what float32 would have, so that small steps add up, without a copy. Other leaves are
    trained as they are. Goes around the whole optimizer: updates are float32, the way from param to rounded result.

    Source: Zamirai et al. 2020 (arXiv:2010.06192).
    Raises: TypeError naming a float16 param, for which there is no such rounding.

    >>> params = torch.ones(10000, dtype=torch.bfloat16)
    >>> optimizer = ft.optim.round_params_stochastically(ft.optim.sgd(2**-9), key=ft.random.key(0))
    >>> updates, _ = optimizer.update(torch.ones_like(params), optimizer.init(params), params)
    >>> ft.optim.apply_updates(params, updates).unique()  # half of them stay, half move by 2**-8
    tensor([0.9961, 1.0000], dtype=torch.bfloat16)
    """
    inner = with_extra_args_support(inner)

    def init(params: Params) -> RoundedParamsState:
        for path, leaf in tree.items(params):
            if leaf.dtype == torch.float16:
                raise TypeError(
                    f"round_params_stochastically: {path}: expected bfloat16 or a wider dtype, came float16; "
                    "use keep_master_copies"
                )
        start = (random.key(0) if key is None else key.clone()).to(device_of(params))
        return RoundedParamsState(start, inner.init(_wide(params)))

    def update(
        updates: Updates, state: RoundedParamsState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, RoundedParamsState]:
        check_params(params, "round_params_stochastically")
        next_key, noise = random.split(state.key).unbind()
        wide = _wide(params)
        steps, inner_state = inner.update(tree.cast_like(updates, wide), state.inner_state, wide, **extra_args)
        leaves, structure = tree.flatten(params)
        new, ways = tree.leaves(apply_updates(wide, steps)), tree.leaves(steps)
        half = [i for i, leaf in enumerate(leaves) if _half(leaf)]
        bits = random.bits_of_each(random.split(noise, len(leaves))[half], [leaves[i] for i in half])
        for i, drawn in zip(half, bits, strict=True):
            ways[i] = _way(leaves[i], round_with_bits(new[i], drawn))
        return tree.unflatten(structure, ways), RoundedParamsState(next_key, inner_state)

    return GradientTransformationExtraArgs(init, update)


def _wide(params: Params, master: Params = None) -> Params:
    """Return params with float32 in place of half precision: the copies, or new ones where there are none."""
    leaves, structure = tree.flatten(params)
    copies = tree.leaves(master)[::-1]
    return tree.unflatten(
        structure,
        [(copies.pop() if copies else leaf.float()) if _half(leaf) else leaf for leaf in leaves],
    )


def _master(params: Params, wide: Params) -> Params:
    leaves, structure = tree.flatten(params)
    rows = zip(leaves, tree.leaves(wide), strict=True)
    return tree.unflatten(structure, [new if _half(leaf) else None for leaf, new in rows])


def _way(old: Tensor, new: Tensor) -> Tensor:
    # float32 holds the difference of two bfloat16, so that apply_updates arrives at `new`
    return new.float() - old.float()


def _half(leaf: Tensor) -> bool:
    return leaf.dtype in (torch.bfloat16, torch.float16)
