"""What a loss function returns."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from torch import Tensor


class Loss(NamedTuple):
    """What a loss function returns: sums, so that parts of a batch add up to the whole batch's loss exactly.

    The weight counts rows, or adds weights that are given: where parts are added it is no function of params. One that
    is learned belongs into the total.
    """

    total: Tensor  # (), float32: sum of the weighted losses
    weight: Tensor  # (), float32: sum of the weights; total / weight is the mean
    metrics: dict[str, Tensor]  # each (): sums over the same weights


# of a tensor, which is a mean, the weight counts as 1; metrics beside it are means too
LossResult: TypeAlias = Loss | Tensor | tuple[Tensor, dict[str, Tensor]]
