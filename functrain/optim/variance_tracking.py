"""Moving averages of mean and variance over the examples of a batch; a part of `aggregating`.

B examples.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.numerics.safe import working_dtype, zero_count
from functrain.optim.transformation import GradientTransformationExtraArgs, OptState, Updates
from functrain.schedules import Scalar
from functrain.tree import Params


class PerElementMeanAndVarianceEMAState(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # (), int64: updates so far
    ema_decay: Tensor  # (), float32, or float64 beside params of it
    mean_grads_ema: Updates  # like params: average of the means over examples
    variance_grads_ema: Updates  # like params: average of the variances over examples


def track_per_element_mean_and_variance_with_ema(ema_decay: Scalar = 0.9) -> GradientTransformationExtraArgs:
    """Keep moving averages of mean and variance over examples; updates stay.

    It reads the keyword arguments that `get_per_element_mean_and_sum_sq_diff_grads` gives through `process`.

    >>> tx = ft.optim.aggregating.track_per_element_mean_and_variance_with_ema(ema_decay=0.9)
    >>> tx.update(torch.ones(()), tx.init(torch.ones(())), sum_sq_diff_grads=torch.tensor(6.5), sample_size=3)[1][2:]
    (tensor(0.1000), tensor(0.3250))
    """

    def init(params: Params) -> PerElementMeanAndVarianceEMAState:
        count, zeros = zero_count(params), tree.zeros_like(params)
        decay = torch.as_tensor(ema_decay, dtype=working_dtype(params), device=count.device)
        return PerElementMeanAndVarianceEMAState(count, decay, zeros, zeros)

    def update(
        updates: Updates,
        state: PerElementMeanAndVarianceEMAState,
        params: Params | None = None,
        *,
        sum_sq_diff_grads: Updates,
        sample_size: int | Tensor,
        **_: Any,
    ) -> tuple[Updates, PerElementMeanAndVarianceEMAState]:
        def averaged(new: Tensor, old: Tensor) -> Tensor:
            return (1.0 - ema_decay) * new + ema_decay * old

        variance = tree.map(lambda x: x / (sample_size - 1), sum_sq_diff_grads)
        means = tree.map(averaged, updates, state.mean_grads_ema)
        variances = tree.map(averaged, variance, state.variance_grads_ema)
        return updates, state._replace(count=state.count + 1, mean_grads_ema=means, variance_grads_ema=variances)

    return GradientTransformationExtraArgs(init, update)


def get_unbiased_mean_and_variance_ema(state: OptState) -> tuple[Updates, Updates]:
    """Return the moving averages of mean and variance over examples, corrected for their start at zero.

    Raises: ValueError for a state without them.

    >>> opt, rows = ft.optim.aggregating.add_mean_variance_to_opt(ft.optim.sgd(0.1)), torch.tensor([1.0, 2.0, 4.5])
    >>> ft.optim.aggregating.get_unbiased_mean_and_variance_ema(opt.update(rows, opt.init(torch.tensor(0.0)))[1])
    (tensor(2.5000), tensor(3.2500))
    """
    found = tree.get(state, "PerElementMeanAndVarianceEMAState")
    if found is None:
        raise ValueError(
            "get_unbiased_mean_and_variance_ema: expected a state with a PerElementMeanAndVarianceEMAState, came one "
            "without; make the optimizer with add_mean_variance_to_opt"
        )
    weight = 1 - found.ema_decay**found.count
    mean, variance = (tree.map(lambda x: x / weight.to(x.dtype), t) for t in found[2:])
    return mean, variance
