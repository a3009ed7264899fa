"""Learning rates that decay from the last layer to the first."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

import functrain.tree as tree
from functrain.optim.numerics.safe import like, scalar, zero_count
from functrain.optim.transformation import GradientTransformation, Updates
from functrain.schedules import ScalarOrSchedule
from functrain.tree import Params


class LayerwiseDecayState(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far


def layerwise_decay(
    decay_rate: ScalarOrSchedule, depth: Callable[[str], int], deepest: int | None = None
) -> GradientTransformation:
    """Multiply the update of each path by `decay_rate ** (deepest - depth(path))`.

    The deepest layer, that of the largest depth among the leaves if None is given, learns at the full rate; each one
    before it at `decay_rate` of the next. It comes after what rescales updates, such as `adamw`, which would undo it;
    then weight decay is less in early layers too. A model of 12 blocks whose embedding is before and whose head is
    after them:

    `depth = lambda path: int(path.split("/")[1]) + 1 if path.startswith("blocks") else 13 * path.startswith("head")`

    Source: Howard and Ruder 2018 (arXiv:1801.06146), discriminative fine-tuning; Clark et al. 2020 (arXiv:2003.10555).

    Raises: ValueError naming the path whose depth is no integer from 0 to `deepest`.

    >>> tx = ft.optim.layerwise_decay(0.5, depth=lambda path: int(path.split("/")[1]))
    >>> updates = {"blocks": [torch.ones(1), torch.ones(1), torch.ones(1)]}
    >>> tx.update(updates, tx.init(updates))[0]
    {'blocks': [tensor([0.2500]), tensor([0.5000]), tensor([1.])]}
    """

    def init(params: Params) -> LayerwiseDecayState:
        _depths(params, depth, deepest)
        return LayerwiseDecayState(zero_count(params))

    def update(
        updates: Updates, state: LayerwiseDecayState, params: Params | None = None
    ) -> tuple[Updates, LayerwiseDecayState]:
        rate = scalar(decay_rate(state.count) if callable(decay_rate) else decay_rate, updates)
        depths = _depths(updates, depth, deepest)
        last = max(depths, default=0) if deepest is None else deepest
        factors = {below: rate**below for below in {last - d for d in depths}}
        leaves, structure = tree.flatten(updates)
        new = [like(factors[last - d], g) * g if d < last else g for g, d in zip(leaves, depths, strict=True)]
        return tree.unflatten(structure, new), LayerwiseDecayState(state.count + 1)

    return GradientTransformation(init, update)


def _depths(params: Params, depth: Callable[[str], int], deepest: int | None) -> list[int]:
    depths = [depth(path) for path in tree.paths(params)]
    for path, d in zip(tree.paths(params), depths, strict=True):
        if not isinstance(d, int) or d < 0 or (deepest is not None and d > deepest):
            bound = "" if deepest is None else f" to deepest={deepest}"
            raise ValueError(f"layerwise_decay: {path}: expected a depth, an integer from 0{bound}, came {d!r}")
    return depths
