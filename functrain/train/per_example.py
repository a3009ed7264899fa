"""Steps that look at the gradient of every example: differential privacy, and the noise of the gradient.

B examples in a batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain import random, transforms, tree
from functrain.losses import Loss
from functrain.optim import GradientTransformation, apply_updates, with_extra_args_support
from functrain.optim.clipping.per_example import norms as norms_of_examples
from functrain.train import checks
from functrain.train.protocols import Batch, LossFn
from functrain.train.state import TrainState
from functrain.train.step_parts import Metrics, OptimizerStep, loss_of
from functrain.train.trainable import Trainable, check_marks, of_trained, splitting, whole
from functrain.transforms import per_example
from functrain.tree import Params, Tree


class _Found(NamedTuple):
    loss: Loss  # of the whole batch
    counted: Tensor  # (B,), bool: which examples have a weight
    grads: Tree  # each leaf (B, ...)


def private_step(
    loss_fn: LossFn[Batch],
    optimizer: GradientTransformation,
    *,
    chunk_size: int | None = None,
    trainable: Trainable | None = None,
) -> OptimizerStep[Batch]:
    """Make a step `(state, batch) -> (state, metrics)` whose optimizer is given the gradient of every example.

    That is what `optim.dpsgd`, and any chain that begins with `optim.differentially_private_aggregate`, expect. An
    example's loss is its own `total / weight`, so that no example's gradient depends on another one; an example of
    weight 0 (a padded row) has gradient 0. Example i draws from `fold_in(fold_in(state.key, step), i)`. The optimizer
    divides by B, padded rows included; a batch of padded rows alone, which sampling may draw, moves params by noise.

    With `trainable`, as in `ft.train_step` and `ft.init_state`, the other params are frozen: they have no gradient, no
    noise, and no part in the norm that is clipped, so that all of the clip is left to those that are trained.

    Metrics: "loss" (total / weight over the batch, before noise: not private), "weight", "gradient_norm_mean" of single
    examples of some weight, from which to choose the clip, and the loss's own divided by weight. Where no example has a
    weight they are 0.
    Raises: TypeError for an optimizer that takes the loss as `value=`, because the loss is not private; ValueError for
    a state with a loss scale, a guard or buffers, or made with another `trainable`.

    >>> optimizer = ft.optim.dpsgd(0.5, l2_norm_clip=1.0, noise_multiplier=0.0, seed=0)  # no privacy
    >>> step = ft.train.private_step(lambda params, x, key: torch.sum((params["w"] - x) ** 2), optimizer)
    >>> state = ft.init_state({"w": torch.tensor(0.0)}, optimizer, key=ft.random.key(0))
    >>> state, metrics = step(state, torch.tensor([1.0, 3.0]))  # gradients of -2 and -6, clipped to -1 each
    >>> state.params["w"], metrics["gradient_norm_mean"]
    (tensor(0.5000), tensor(4.))
    """

    split = splitting("private_step", trainable)

    def own_mean(trained: Params, frozen: Params, example: Batch, key: Tensor) -> tuple[Tensor, Loss]:
        params = whole(trained, frozen)
        result = checks.call("private_step", loss_fn, "params, example, key", params, example, key)
        loss = loss_of(result, False, ("loss", "weight", "gradient_norm_mean"))
        return loss.total / _divisor(loss), loss

    of_examples = per_example.beside_examples(own_mean, True, chunk_size)

    def gradients(state: TrainState, batch: Batch) -> _Found:
        _check_state("private_step", state)
        trained, frozen = split(state.params)
        check_marks("private_step", state, trained, trainable)
        (_, losses), grads = of_examples(trained, (frozen,), batch, random.fold_in(state.key, state.step))
        # a padded row may hold anything: 0 times NaN is NaN
        counted = losses.weight != 0
        losses, grads = tree.map(lambda leaf: _where(counted, leaf), (losses, grads))
        return _Found(tree.map(lambda leaf: torch.sum(leaf, 0), losses), counted, grads)

    def update(state: TrainState, found: _Found) -> tuple[TrainState, Metrics]:
        loss, counted, grads = found
        trained, frozen = split(state.params)
        try:
            updates, opt_state = checks.update("private_step", optimizer, grads, state.opt_state, trained)
        except TypeError as error:
            if "'value'" not in str(error):
                raise
            raise TypeError(
                "private_step: the optimizer takes the loss of the batch as value=, which is not private: updates that "
                "depend on it have no epsilon; use a schedule, or a loss measured on public data"
            ) from error
        norms = norms_of_examples(grads)  # (B,); the optimizer's own, to a compiler
        mean = torch.sum(torch.where(counted, norms, 0.0)) / torch.clamp(torch.sum(counted), min=1)
        new = _next(state, whole(apply_updates(trained, updates), frozen), opt_state)
        return new, _metrics(loss) | {"gradient_norm_mean": mean}

    kept_by = optimizer if trainable is None else of_trained(optimizer, split)
    return OptimizerStep(checks.watched("private_step", gradients), update, kept_by)


def noise_scale_step(
    loss_fn: LossFn[Batch],
    optimizer: GradientTransformation,
    *,
    chunk_size: int | None = None,
    trainable: Trainable | None = None,
) -> OptimizerStep[Batch]:
    """Make a step that equals `train_step(loss_fn, optimizer)` and measures the noise of the gradient.

    It costs the gradient of every example, `chunk_size` at a time: meant for a step now and then, on the state of an
    ordinary run. Random numbers of a loss are drawn for each example, so that they are others than `train_step`'s.
    `trainable` is that of the run; the noise is that of the trained params' gradient.

    Metrics: those of `train_step`, "gradient_variance" (trace of the covariance of one example's gradient),
    "gradient_squared_norm" (of the true gradient, without bias) and "gradient_noise_scale", their ratio: the batch size
    beyond which more examples help little; see `transforms.gradient_noise`. Examples of weight 0 are none; of a single
    one the three are NaN.
    Raises: ValueError for a batch of one row, whose variance nothing tells, and for a state with a loss scale, a guard
    or buffers, or made with another `trainable`.

    >>> loss_fn = lambda params, x, key: ft.Loss(torch.sum((params["w"] - x) ** 2), torch.tensor(1.0 * len(x)), {})
    >>> step = ft.train.noise_scale_step(loss_fn, ft.optim.sgd(0.1))
    >>> state = ft.init_state({"w": torch.tensor(0.0)}, ft.optim.sgd(0.1), key=ft.random.key(0))
    >>> state, metrics = step(state, torch.tensor([1.0, 3.0]))  # gradients of -2 and -6
    >>> metrics["gradient_variance"], metrics["gradient_squared_norm"], metrics["gradient_noise_scale"]
    (tensor(8.), tensor(12.), tensor(0.6667))
    """
    tx, split = with_extra_args_support(optimizer), splitting("noise_scale_step", trainable)

    def sums(trained: Params, frozen: Params, example: Batch, key: Tensor) -> tuple[Loss, Tensor]:
        params = whole(trained, frozen)
        result = checks.call("noise_scale_step", loss_fn, "params, example, key", params, example, key)
        loss = loss_of(result, True, _MEASURED)
        return loss, (loss.weight != 0).to(torch.int64)

    moments_of = per_example.moments_beside(sums, True, chunk_size)

    def gradients(state: TrainState, batch: Batch) -> transforms.GradientMoments:
        _check_state("noise_scale_step", state)
        trained, frozen = split(state.params)
        check_marks("noise_scale_step", state, trained, trainable)
        moments = moments_of(trained, (frozen,), batch, random.fold_in(state.key, state.step))
        if moments.examples < 2:
            raise ValueError("noise_scale_step: expected two examples or more, came one, whose variance nothing tells")
        return moments

    def update(state: TrainState, found: transforms.GradientMoments) -> tuple[TrainState, Metrics]:
        loss, count = found.result
        share = 1 / loss.weight
        grads = tree.map(lambda grad: grad * share.to(grad.dtype), found.grads, by_kind=True)
        norm = tree.norm(grads)
        noise = transforms.gradient_noise(found.squared_norm * count * share**2, norm**2, 1, count)
        trained, frozen = split(state.params)
        updates, opt_state = checks.update(
            "noise_scale_step", tx, grads, state.opt_state, trained, value=loss.total / loss.weight
        )
        measured = dict(zip(_MEASURED[2:], (norm, noise.variance, noise.squared_norm, noise.scale), strict=True))
        return _next(state, whole(apply_updates(trained, updates), frozen), opt_state), _metrics(loss) | measured

    kept_by = optimizer if trainable is None else of_trained(optimizer, split)
    return OptimizerStep(checks.watched("noise_scale_step", gradients), update, kept_by)


_MEASURED = (
    *("loss", "weight"),
    *("grad_norm", "gradient_variance", "gradient_squared_norm", "gradient_noise_scale"),
)


def _next(state: TrainState, params: Params, opt_state: Tree) -> TrainState:
    return state._replace(step=state.step + 1, params=params, opt_state=opt_state)


def _metrics(loss: Loss) -> dict[str, Any]:
    divisor = _divisor(loss)
    own = {name: value / divisor for name, value in loss.metrics.items()}
    return own | {"loss": loss.total / divisor, "weight": loss.weight}


def _divisor(loss: Loss) -> Tensor:
    return torch.where(loss.weight == 0, 1.0, loss.weight)


def _where(counted: Tensor, leaf: Tensor) -> Tensor:
    return torch.where(counted.reshape(-1, *[1] * (leaf.dim() - 1)), leaf, 0)


def _check_state(what: str, state: TrainState) -> None:
    for name in ("loss_scale", "guard", "buffers"):
        if tree.leaves(getattr(state, name)):
            raise ValueError(
                f"{what}: expected a state without {name}, which this step does not update, came one with; make it "
                f"with init_state without {name}, or pass state._replace({name}=None)"
            )
