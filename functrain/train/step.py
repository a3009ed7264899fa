"""Loss and optimizer make a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrain import random, transforms, tree
from functrain.losses import Loss
from functrain.optim import GradientTransformation, apply_updates
from functrain.train.state import TrainState
from functrain.tree import Batch, Params, Tree

LossFn = Callable[[Params, Batch, Tensor], Any]
Metrics = dict[str, Tensor]


def train_step(loss_fn: LossFn, optimizer: GradientTransformation, *, accumulate: int = 1) -> transforms.Staged:
    """Make the function `(state, batch) -> (state, metrics)` that takes one step.

    `loss_fn(params, batch, key)` returns a `Loss`, or a () tensor, or `(tensor, metrics)`, which count as weight 1 for
    the batch. The gradient is that of `total / weight`, divided once after all `accumulate` slices of the batch are
    added. Step t draws from `fold_in(state.key, t)`. The step is pure, reads nothing back to the host, and can be
    given to `ft.compile`.

    Metrics: "loss" (total / weight), "weight", "grad_norm" (before the optimizer), and each of the loss's own divided
    by weight; all () tensors.
    """

    def sums(params: Params, batch: Batch, key: Tensor) -> Loss:
        return _loss(loss_fn(params, batch, key))

    def mean(params: Params, batch: Batch, key: Tensor, step: Tensor) -> tuple[Tensor, Loss]:
        loss = sums(params, batch, random.fold_in(key, step))
        return loss.total / loss.weight, loss

    of_mean = transforms.value_and_grad(mean, has_aux=True)
    of_sums = transforms.accumulate(transforms.value_and_grad(sums), accumulate)

    def gradients(state: TrainState, batch: Batch) -> tuple[Loss, Tree, Tensor | None]:
        if accumulate == 1:  # divided, and the key folded, where they are compiled with the loss
            (_, loss), grads = of_mean(state.params, batch, state.key, state.step)
            return loss, grads, None
        loss, grads = of_sums(state.params, batch, random.fold_in(state.key, state.step))
        return loss, grads, 1 / loss.weight

    def update(state: TrainState, found: tuple[Loss, Tree, Tensor | None]) -> tuple[TrainState, Metrics]:
        loss, grads, share = found
        if share is not None:
            grads = tree.map(lambda grad: grad * share.to(grad.dtype), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {name: value / loss.weight for name, value in loss.metrics.items()}
        metrics |= {"loss": loss.total / loss.weight, "weight": loss.weight, "grad_norm": tree.norm(grads)}
        new = TrainState(state.step + 1, apply_updates(state.params, updates), opt_state, state.key)
        return new, metrics

    return transforms.Staged(gradients, update)


def _loss(result: Any) -> Loss:
    if isinstance(result, Loss):
        return result
    value, metrics = result if isinstance(result, tuple) else (result, {})
    if not isinstance(value, Tensor) or not isinstance(metrics, dict):
        raise TypeError(
            f"train_step: expected loss_fn to return a Loss, a tensor, or (tensor, dict of metrics), came {result!r}"
        )
    return Loss(value, torch.ones((), device=value.device), metrics)
