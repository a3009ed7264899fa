"""What a training run is, between two steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from functrain import tree
from functrain.optim import GradientTransformation
from functrain.tree import Params, Tree


class TrainState(NamedTuple):
    step: Tensor  # (), int64: steps done
    params: Params
    opt_state: Tree
    key: Tensor  # (2,), int32: step t uses fold_in(key, t)


def init_state(params: Params, optimizer: GradientTransformation, *, key: Tensor) -> TrainState:
    """Return the state before the first step.

    Raises: TypeError naming a leaf that is no floating-point tensor; ValueError for keys that make a path ambiguous.
    """
    for path, leaf in tree.items(params):
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            came = f"dtype {leaf.dtype}" if isinstance(leaf, Tensor) else f"{type(leaf).__name__} {leaf!r}"
            raise TypeError(
                f"init_state: {path}: expected a floating-point tensor to train, came {came}; keep it out of params"
            )
    device = next((leaf.device for leaf in tree.leaves(params)), key.device)
    step = torch.zeros((), dtype=torch.int64, device=device)
    return TrainState(step, params, optimizer.init(params), key.to(device, copy=True))
