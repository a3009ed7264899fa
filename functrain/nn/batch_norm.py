"""Batch norm, whose running statistics go in and come out: in training new ones, in evaluation none.

    stats = ft.nn.batch_stats(64)
    y, stats = ft.nn.batch_norm(x, stats, **params["norm"])       # training
    y = ft.nn.batch_norm_inference(x, stats, **params["norm"])    # evaluation

`ft.train_step(..., buffers=True)` carries them.

B batch, C channels, *S dims of space, none or more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from functrain.compiler import engine
from functrain.nn import normalization
from functrain.sharding import collectives
from functrain.sharding.mesh import Axes


class BatchStats(NamedTuple):
    """The running statistics of a `batch_norm`."""

    running_mean: Tensor  # (C,), float32 or wider: moving average of the means of batches
    running_var: Tensor  # (C,), float32 or wider: of their variances, without bias


def batch_stats(channels: int, *, device: torch.device | str | None = None) -> BatchStats:
    """Return the statistics before the first batch: mean 0 and variance 1.

    >>> ft.nn.batch_stats(2)
    BatchStats(running_mean=tensor([0., 0.]), running_var=tensor([1., 1.]))
    """
    return BatchStats(torch.zeros(channels, device=device), torch.ones(channels, device=device))


def batch_norm(
    x: Tensor,
    stats: BatchStats,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    axes: Axes | None = None,
) -> tuple[Tensor, BatchStats]:
    """Return x (B, C, *S) with mean 0 and variance 1 in each channel, times weight (C,), plus bias (C,), and the new
    statistics: the old ones, moved by `momentum` of the way to those of the batch.

    Computed in float32 at least; the result is in x's dtype. No gradient goes through the statistics.

    In a step with a `ft.sharding.Plan` the batch is the rows of this rank, or with `axes`, such as "data", those of all
    ranks along these axes of the mesh: synchronized batch norm, by two sums over ranks, and the step of one process on
    all rows. As `axis_name` of flax.

    Equals `torch.nn.functional.batch_norm` in training, which writes into its statistics. Source: Ioffe and Szegedy
    2015 (arXiv:1502.03167).

    Raises: ValueError for statistics in half precision, which would stop where steps are small, for a batch of one
    number a channel, and for axes that the mesh does not have; RuntimeError for axes without a plan.

    >>> y, stats = ft.nn.batch_norm(torch.tensor([[1.0], [3.0]]), ft.nn.batch_stats(1))
    >>> y.flatten(), stats.running_mean
    (tensor([-1.0000,  1.0000]), tensor([0.2000]))
    """
    _check("batch_norm", x, stats)
    wide = _wide(x, stats)
    inputs, weight, bias = (None if t is None else t.to(wide) for t in (x, weight, bias))
    assert inputs is not None
    if axes is not None:
        y, mean, var = _over_ranks(inputs, weight, bias, axes, eps)
    else:
        norm = normalization.batch_norm if engine.twice() else F.batch_norm
        y = norm(inputs, None, None, weight, bias, True, 0.0, eps)
        var, mean = torch.var_mean(inputs.detach(), [0, *range(2, x.dim())], correction=1)
    moved = [
        torch.lerp(old, new.to(old.dtype), momentum)
        for old, new in ((stats.running_mean, mean), (stats.running_var, var))
    ]
    return y.to(x.dtype), BatchStats(*moved)


def _over_ranks(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: Axes, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, normalized by the rows of all ranks along the axes, and their mean and variance without bias, (C,)."""
    others, shape = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
    both = torch.cat([x.sum(others), x.new_full((1,), x.numel() // x.shape[1])])
    total, count = collectives.sum(both, axes).split([x.shape[1], 1])
    mean = total / count
    centred = x - mean.view(shape)
    squares = collectives.sum(centred.square().sum(others), axes)
    y = centred * torch.rsqrt(squares / count + eps).view(shape)
    y = y if weight is None else y * weight.view(shape)
    y = y if bias is None else y + bias.view(shape)
    return y, mean.detach(), (squares / (count - 1)).detach()


def batch_norm_inference(
    x: Tensor, stats: BatchStats, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """Return x (B, C, *S) less the running mean, over the root of the running variance, times weight (C,), plus bias
    (C,).

    Computed in float32 at least, and returned in x's dtype. Equals `torch.nn.functional.batch_norm` in evaluation.

    Raises: ValueError for statistics in half precision.

    >>> stats = ft.nn.BatchStats(running_mean=torch.tensor([2.0]), running_var=torch.tensor([4.0]))
    >>> ft.nn.batch_norm_inference(torch.tensor([[3.0], [0.0]]), stats).flatten()
    tensor([ 0.5000, -1.0000])
    """
    _check("batch_norm_inference", x, stats)
    wide = _wide(x, stats)
    inputs, mean, var, weight, bias = (None if t is None else t.to(wide) for t in (x, *stats, weight, bias))
    assert inputs is not None
    return F.batch_norm(inputs, mean, var, weight, bias, False, 0.0, eps).to(x.dtype)


def _wide(x: Tensor, stats: BatchStats) -> torch.dtype:
    return torch.promote_types(x.dtype, stats.running_mean.dtype)


def _check(what: str, x: Tensor, stats: BatchStats) -> None:
    dtypes = {leaf.dtype for leaf in stats}
    if not dtypes <= {torch.float32, torch.float64}:
        raise ValueError(
            f"{what}: expected running statistics in float32 or float64, came {dtypes}, which lose small steps; for "
            "ft.mixed_precision, give its Policy exceptions={'**running_*': torch.float32}"
        )
    if x.dim() < 2 or x.shape[1] != len(stats.running_mean):
        raise ValueError(
            f"{what}: expected x (B, C, *S) with C = {len(stats.running_mean)}, as the statistics have, came "
            f"{tuple(x.shape)}; make them by ft.nn.batch_stats({x.shape[1] if x.dim() > 1 else 'C'})"
        )
