"""Steps that look at the gradient of every example: differential privacy, and the noise of the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functrain import random, transforms, tree
from functrain.losses import Loss
from functrain.optim import GradientTransformation, apply_updates
from functrain.train.state import TrainState
from functrain.train.step import LossFn, Metrics
from functrain.train.step import _loss as as_loss
from functrain.tree import Batch, Params, Tree


def private_step(
    loss_fn: LossFn, optimizer: GradientTransformation, *, chunk_size: int | None = None
) -> transforms.Staged:
    """Make a step `(state, batch) -> (state, metrics)` whose optimizer is given the gradient of every example.

    That is what `optim.dpsgd`, and any chain that begins with `optim.differentially_private_aggregate`, expect. An
    example's loss is its own `total / weight`, so that no example's gradient depends on another one; an example of
    weight 0 (a padded row) has gradient 0. Example i draws from `fold_in(fold_in(state.key, step), i)`.

    Metrics: "loss" (total / weight over the batch, before noise: not private), "weight", "gradient_norm_mean" of single
    examples, from which to choose the clip, and the loss's own divided by weight.
    """

    def own_mean(params: Params, example: Batch, key: Tensor) -> tuple[Tensor, Loss]:
        loss = as_loss(loss_fn(params, example, key), False)
        return loss.total / torch.where(loss.weight == 0, 1.0, loss.weight), loss

    of_examples = transforms.per_example_value_and_grad(own_mean, has_aux=True, chunk_size=chunk_size)

    def gradients(state: TrainState, batch: Batch) -> tuple[Loss, Tree]:
        (_, losses), grads = of_examples(state.params, batch, random.fold_in(state.key, state.step))
        return tree.map(lambda leaf: torch.sum(leaf, 0), losses), grads

    def update(state: TrainState, found: tuple[Loss, Tree]) -> tuple[TrainState, Metrics]:
        loss, grads = found
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        squares = [torch.sum(leaf.reshape(len(leaf), -1) ** 2, 1) for leaf in tree.leaves(grads)]
        norms = torch.sqrt(torch.stack(squares).sum(0))  # (B,)
        return _next(state, updates, opt_state), _metrics(loss) | {"gradient_norm_mean": torch.mean(norms)}

    return transforms.Staged(gradients, update)


def noise_scale_step(
    loss_fn: LossFn, optimizer: GradientTransformation, *, chunk_size: int | None = None
) -> transforms.Staged:
    """Make a step that equals `train_step(loss_fn, optimizer)` and measures the noise of the gradient.

    It costs the gradient of every example, `chunk_size` at a time: meant for a step now and then, on the state of an
    ordinary run. Random numbers of a loss are drawn for each example, so that they are others than `train_step`'s.

    Metrics: those of `train_step`, "gradient_variance" (trace of the covariance of one example's gradient),
    "gradient_squared_norm" (of the true gradient, without bias) and "gradient_noise_scale", their ratio: the batch size
    beyond which more examples help little; see `transforms.gradient_noise`.
    Raises: ValueError for a batch of one example, whose variance nothing tells.
    """

    def sums(params: Params, example: Batch, key: Tensor) -> Loss:
        return as_loss(loss_fn(params, example, key), True)

    moments_of = transforms.gradient_moments(sums, chunk_size=chunk_size)

    def gradients(state: TrainState, batch: Batch) -> transforms.GradientMoments:
        return moments_of(state.params, batch, random.fold_in(state.key, state.step))

    def update(state: TrainState, found: transforms.GradientMoments) -> tuple[TrainState, Metrics]:
        loss, size = found.result, found.examples
        share = 1 / loss.weight
        grads = tree.map(lambda grad: grad * share.to(grad.dtype), found.grads)
        norm = tree.norm(grads)
        noise = transforms.gradient_noise(found.squared_norm * size * share**2, norm**2, 1, size)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        measured = {
            "grad_norm": norm,
            "gradient_variance": noise.variance,
            "gradient_squared_norm": noise.squared_norm,
            "gradient_noise_scale": noise.scale,
        }
        return _next(state, updates, opt_state), _metrics(loss) | measured

    return transforms.Staged(gradients, update)


def _next(state: TrainState, updates: Tree, opt_state: Tree) -> TrainState:
    params = apply_updates(state.params, updates)
    return state._replace(step=state.step + 1, params=params, opt_state=opt_state)


def _metrics(loss: Loss) -> dict[str, Any]:
    own = {name: value / loss.weight for name, value in loss.metrics.items()}
    return own | {"loss": loss.total / loss.weight, "weight": loss.weight}
