"""Differential privacy: gradients of single examples, clipped, added, with noise."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

import functrain.random as random
import functrain.tree as tree
from functrain.optim.averaging import trace
from functrain.optim.clipping.per_example import clipped_sums
from functrain.optim.combining import chain
from functrain.optim.numerics.safe import (
    add_scaled,
    device_of,
)
from functrain.optim.scaling import scale_by_learning_rate
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    Updates,
    check_real,
    identity,
)
from functrain.schedules import Scalar, ScalarOrSchedule
from functrain.tree import Params


class DifferentiallyPrivateAggregateState(NamedTuple):
    rng_key: Tensor  # (2,), int32


def differentially_private_aggregate(
    l2_norm_clip: Scalar, noise_multiplier: Scalar, key: Tensor | int | None = None, *, seed: int | None = None
) -> GradientTransformation:
    """Average gradients of single examples, each clipped, with normal noise of l2_norm_clip * noise_multiplier.

    B is the number of rows, padded ones too, since how many were drawn is not to be told. Clips, adds and draws in
    float32 at least, and returns the dtype of the gradients. A leaf draws by its number among the leaves.

    Shapes: every leaf of updates is (B, ...), of the new updates (...).

    Source: Abadi et al. 2016 (arXiv:1607.00133), algorithm 1; the numbers are optax's.

    Raises: ValueError without a key or a seed, and with both; ValueError naming a leaf that has no batch;
    TypeError naming the leaf that is complex.

    >>> tx = ft.optim.differentially_private_aggregate(l2_norm_clip=1.0, noise_multiplier=0.0, key=0)
    >>> tx.update(torch.tensor([[6.0, 8.0], [0.0, 0.4]]), tx.init(torch.zeros(2)))[0]
    tensor([0.3000, 0.6000])
    """
    if (key is None) == (seed is None):
        raise ValueError("differentially_private_aggregate: pass key=, a key of functrain.random or an int")
    start = key if key is not None else seed

    def init(params: Params) -> DifferentiallyPrivateAggregateState:
        check_real(params, "differentially_private_aggregate")
        rng_key = start.clone() if isinstance(start, Tensor) else random.key(start or 0)
        return DifferentiallyPrivateAggregateState(rng_key.to(device_of(params)))

    def update(
        updates: Updates, state: DifferentiallyPrivateAggregateState, params: Params | None = None
    ) -> tuple[Updates, DifferentiallyPrivateAggregateState]:
        if not tree.leaves(updates):  # a mask may hide all
            return updates, state
        sums, _ = clipped_sums(updates, l2_norm_clip)
        leaves, structure = tree.flatten(sums)
        dtypes = [g.dtype for g in tree.leaves(updates)]
        size = len(tree.leaves(updates)[0])
        keys = random.split(state.rng_key, len(leaves) + 1)
        noise = random.normal_of_each(keys[1:], leaves)
        noisy = [add_scaled(g, l2_norm_clip * noise_multiplier, n) / size for g, n in zip(leaves, noise, strict=True)]
        noisy = [g.to(dtype) for g, dtype in zip(noisy, dtypes, strict=True)]
        return tree.unflatten(structure, noisy), DifferentiallyPrivateAggregateState(keys[0])

    return GradientTransformation(init, update)


def dpsgd(
    learning_rate: ScalarOrSchedule,
    l2_norm_clip: Scalar,
    noise_multiplier: Scalar,
    seed: int,
    momentum: Scalar | None = None,
    nesterov: bool = False,
) -> GradientTransformationExtraArgs:
    """Descend along the `differentially_private_aggregate` of gradients of single examples.

    >>> optimizer, params = ft.optim.dpsgd(0.1, l2_norm_clip=1.0, noise_multiplier=1.1, seed=0), torch.zeros(2)
    >>> grads = ft.per_example_grad(lambda params, x: torch.sum((params - x) ** 2))(params, torch.ones(3, 2))
    >>> optimizer.update(grads, optimizer.init(params), params)[0].shape
    torch.Size([2])
    """
    return chain(
        differentially_private_aggregate(l2_norm_clip, noise_multiplier, seed=seed),
        identity() if momentum is None else trace(momentum, nesterov),
        scale_by_learning_rate(learning_rate),
    )
