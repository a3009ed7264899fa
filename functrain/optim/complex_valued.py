"""Complex parameters as pairs of real ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    OptState,
    Updates,
    with_extra_args_support,
)
from functrain.tree import Params, Tree


class SplitRealAndImaginaryArrays(NamedTuple):
    real: Tensor  # like the parameter
    imaginary: Tensor  # like the parameter


class SplitRealAndImaginaryState(NamedTuple):
    inner_state: OptState  # for params with a pair in place of each complex leaf


def split_real_and_imaginary(inner: GradientTransformation) -> GradientTransformationExtraArgs:
    """Apply `inner` to params and updates in which each complex leaf is a pair of its real and imaginary parts.

    It is the way for what is defined for real numbers only, as `clip` and `prodigy`. A function among the keyword
    arguments, as the `obj_fn` of `sophia`, is given the pairs.

    >>> tx = ft.optim.split_real_and_imaginary(ft.optim.clip(1.0))
    >>> tx.update(torch.tensor([3.0 - 0.5j]), tx.init(torch.zeros(1, dtype=torch.complex64)))[0]
    tensor([1.-0.5000j])
    """
    inner = with_extra_args_support(inner)

    def init(params: Params) -> SplitRealAndImaginaryState:
        return SplitRealAndImaginaryState(inner.init(_split(params)))

    def update(
        updates: Updates, state: SplitRealAndImaginaryState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, SplitRealAndImaginaryState]:
        pairs = None if params is None else _split(params)
        new, inner_state = inner.update(_split(updates), state.inner_state, pairs, **extra_args)
        parts = iter(tree.leaves(new))
        joined = tree.map(lambda g: torch.complex(next(parts), next(parts)) if g.is_complex() else next(parts), updates)
        return joined, SplitRealAndImaginaryState(inner_state)

    return GradientTransformationExtraArgs(init, update)


def _split(values: Tree) -> Tree:
    return tree.map(lambda x: SplitRealAndImaginaryArrays(x.real, x.imag) if x.is_complex() else x, values)
