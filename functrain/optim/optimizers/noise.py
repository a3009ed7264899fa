"""Noise added to gradients."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

import functrain.random as random
import functrain.tree as tree
from functrain.optim.combining import chain
from functrain.optim.numerics.safe import (
    add_scaled,
    device_of,
    working_dtype,
    zero_count,
)
from functrain.optim.scaling import scale_by_learning_rate
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    Updates,
    check_real,
)
from functrain.schedules import Scalar, ScalarOrSchedule
from functrain.tree import Params


class AddNoiseState(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far
    rng_key: Tensor  # (2,), int32


def add_noise(
    eta: Scalar, gamma: Scalar, key: Tensor | int | None = None, *, seed: int | None = None
) -> GradientTransformation:
    """Add normal noise of variance eta / count ** gamma to updates, from a key or a seed; the numbers are optax's.

    A leaf draws by its number among the leaves: one more before it, and it draws others.

    Source: Neelakantan et al. 2015 (arXiv:1511.06807), equation 1.

    Raises: ValueError without a key or a seed, and with both; TypeError naming the leaf that is complex.

    >>> grads, tx = torch.zeros(10000), ft.optim.add_noise(eta=0.25, gamma=0.55, key=0)
    >>> round(tx.update(grads, tx.init(grads))[0].std().item(), 2)
    0.5
    """
    if (key is None) == (seed is None):
        raise ValueError("add_noise: pass key=, a key of functrain.random or an int")
    start = key if key is not None else seed

    def init(params: Params) -> AddNoiseState:
        check_real(params, "add_noise")
        # a copy: the state may be donated, and the key made into the next one in place
        rng_key = start.clone() if isinstance(start, Tensor) else random.key(start or 0)
        return AddNoiseState(zero_count(params), rng_key.to(device_of(params)))

    def update(updates: Updates, state: AddNoiseState, params: Params | None = None) -> tuple[Updates, AddNoiseState]:
        count = state.count + 1
        deviation = (eta / count.to(working_dtype(updates)) ** gamma) ** 0.5
        rng_key, sample_key = random.split(state.rng_key).unbind()
        leaves, structure = tree.flatten(updates)
        noise = random.normal_of_each(random.split(sample_key, len(leaves)), leaves)
        noisy = [add_scaled(g, deviation, n) for g, n in zip(leaves, noise, strict=True)]
        return tree.unflatten(structure, noisy), AddNoiseState(count, rng_key)

    return GradientTransformation(init, update)


def noisy_sgd(
    learning_rate: ScalarOrSchedule,
    eta: Scalar = 0.01,
    gamma: Scalar = 0.55,
    key: Tensor | int | None = None,
    *,
    seed: int | None = None,
) -> GradientTransformationExtraArgs:
    """Descend along the gradient with noise that dies out; `key` is required.

    >>> optimizer, params = ft.optim.noisy_sgd(0.1, key=0), torch.zeros(2)
    >>> optimizer.update(torch.tensor([1.0, -2.0]), optimizer.init(params), params)[0]
    tensor([-0.1020,  0.2077])
    """
    return chain(add_noise(eta, gamma, key, seed=seed), scale_by_learning_rate(learning_rate))
