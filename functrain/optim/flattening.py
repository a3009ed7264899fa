"""One transformation over all leaves as one vector."""

from __future__ import annotations

from typing import Any

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


def flatten(inner: GradientTransformation) -> GradientTransformationExtraArgs:
    """Apply `inner` to all leaves joined to one vector, so that its state is one vector too.

    Equals `inner` where that treats elements alike.

    >>> params, optimizer = {"w": torch.zeros(3, 2), "b": torch.zeros(2)}, ft.optim.flatten(ft.optim.adam(0.1))
    >>> ft.tree.get(optimizer.init(params), "mu").shape
    torch.Size([8])
    """
    inner = with_extra_args_support(inner)

    def init(params: Params) -> OptState:
        return inner.init(_join(params))

    def update(
        updates: Updates, state: OptState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, OptState]:
        joined, new_state = inner.update(_join(updates), state, None if params is None else _join(params), **extra_args)
        leaves, structure = tree.flatten(updates)
        parts = joined.split([leaf.numel() for leaf in leaves])
        # beside complex leaves a real one is complex in the vector, with imaginary parts of 0
        parts = [part if leaf.is_complex() else part.real for part, leaf in zip(parts, leaves, strict=True)]
        cut = [part.reshape(leaf.shape).to(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
        return tree.unflatten(structure, cut), new_state

    return GradientTransformationExtraArgs(init, update)


def _join(values: Tree) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in tree.leaves(values)] or [torch.zeros(0)])
