"""Gradients that are scaled where they pass."""

from __future__ import annotations

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.schedules import Scalar
from functrain.tree import Tree


def scale_gradient(inputs: Tree, scale: Scalar) -> Tree:
    """Return the inputs, bit for bit; their gradient is multiplied by `scale` on its way back.

    Equals `optax.scale_gradient`. An element that is infinite or NaN has a gradient of zero.
    """
    return tree.map(lambda x: _scaled(x, scale), inputs)


def _scaled(x: Tensor, scale: Scalar) -> Tensor:
    fixed = x.detach()
    # zeros that carry the derivative: an autograd.Function would lose its second one under torch.compile
    zeros = torch.where(torch.isfinite(fixed), x - fixed, 0.0)
    return fixed + scale * zeros
