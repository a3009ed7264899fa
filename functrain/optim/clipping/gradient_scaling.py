"""A tree that is itself on the way forward, and scales its gradient on the way back."""

from __future__ import annotations

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.numerics.safe import like
from functrain.schedules import Scalar
from functrain.tree import Tree


def scale_gradient(inputs: Tree, scale: Scalar) -> Tree:
    """Return the tree, whose gradient will be multiplied by `scale`: 0 stops it, -1 reverses it.

    The scale itself has no gradient, nor has an element that is infinite or NaN. Equals `optax.scale_gradient`.

    >>> ft.grad(lambda x: ft.optim.scale_gradient(x, -0.5) ** 2)(torch.tensor(3.0))
    tensor(-3.)
    """
    if not isinstance(scale, Tensor) and scale == 1.0:
        return inputs
    if not isinstance(scale, Tensor) and scale == 0.0:
        return tree.map(torch.detach, inputs)
    fixed = scale.detach() if isinstance(scale, Tensor) else scale
    return tree.map(lambda x: _scaled(x, fixed), inputs)


def _scaled(x: Tensor, scale: Scalar) -> Tensor:
    # plain operations, not an autograd.Function: they compose with every transform, forward mode and compilation too
    scaled = like(scale, x) * x
    zero = torch.nan_to_num(scaled - scaled.detach(), 0.0, 0.0, 0.0)
    return x.detach() + zero
