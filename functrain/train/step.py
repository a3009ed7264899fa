"""Loss and optimizer make a step."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Generic, Literal, NamedTuple, overload

import torch
from torch import Tensor

from functrain import random, transforms, tree
from functrain.losses import Loss
from functrain.optim import GradientTransformation, apply_updates, with_extra_args_support
from functrain.train import checks
from functrain.train.guard import Guard, is_overflow
from functrain.train.protocols import Batch, Batch_contra, LossFn, LossFnWithBuffers
from functrain.train.state import TrainState, check_pairs
from functrain.train.trainable import Trainable, check_marks, of_trained, splitting, whole
from functrain.transforms import accumulation
from functrain.transforms.loss_scale import LossScale, unscale, wide
from functrain.tree import Params, Tree
from functrain.tree.reductions import finite, stays_finite

Metrics = dict[str, Tensor]


class OptimizerStep(Generic[Batch_contra]):
    """A step, `second(state, first(state, batch))`, that says which optimizer's state it keeps."""

    def __init__(
        self, first: Callable[..., Any], second: Callable[[Any, Any], Any], optimizer: GradientTransformation
    ) -> None:
        self.first: Callable[..., Any] = first
        self.second: Callable[[Any, Any], Any] = second
        self.optimizer: GradientTransformation = optimizer

    def __call__(self, state: TrainState, batch: Batch_contra) -> tuple[TrainState, Metrics]:
        return self.second(state, self.first(state, batch))


class _Found(NamedTuple):
    """What the first stage of a step hands to the second."""

    loss: Loss
    buffers: Tree
    grads: Tree  # of total / weight times the scale where `divided`, of total times the scale elsewhere


@overload
def train_step(
    loss_fn: LossFn[Batch],
    optimizer: GradientTransformation,
    *,
    accumulate: int = 1,
    accumulate_rows: int | None = None,
    loss_scale: LossScale | None = None,
    buffers: Literal[False] = False,
    guard: Guard | None = None,
    trainable: Trainable | None = None,
) -> OptimizerStep[Batch]: ...
@overload
def train_step(
    loss_fn: LossFnWithBuffers[Batch],
    optimizer: GradientTransformation,
    *,
    accumulate: int = 1,
    accumulate_rows: int | None = None,
    loss_scale: LossScale | None = None,
    buffers: Literal[True],
    guard: Guard | None = None,
    trainable: Trainable | None = None,
) -> OptimizerStep[Batch]: ...
def train_step(
    loss_fn: Callable[..., Any],
    optimizer: GradientTransformation,
    *,
    accumulate: int = 1,
    accumulate_rows: int | None = None,
    loss_scale: LossScale | None = None,
    buffers: bool = False,
    guard: Guard | None = None,
    trainable: Trainable | None = None,
) -> OptimizerStep[Any]:
    """Make the function `(state, batch) -> (state, metrics)` that takes one step.

    `loss_fn(params, batch, key)` returns a `Loss`, or a () tensor, or `(tensor, metrics)`, which count as weight 1 for
    the batch. The gradient is that of `total / weight`, divided once after all slices of the batch are added: as many
    as `accumulate` says, or slices of `accumulate_rows` rows, of which a later batch may have more; either way the loss
    must be a `Loss`. An optimizer that takes the loss as `value=` gets this quotient. Step t draws from
    `fold_in(state.key, t)`. The step is pure, reads nothing back to the host, and can be given to `ft.compile`.

    With `buffers`, `loss_fn(params, buffers, batch, key)` returns `(loss, new_buffers)`, the loss in any of these
    forms, and `state.buffers` becomes the new ones. A slice of the batch gets the buffers that the slice before
    returned, so that statistics that are moved once a call move once a slice.

    With `loss_scale` the loss is multiplied by `state.loss_scale.scale` before it is differentiated, and the gradients
    are divided by it before the optimizer sees them, half-precision ones in float32. A step in which any gradient is
    infinite or NaN, in any slice, or which would make a finite number of params, opt_state or buffers so, leaves these
    as they were and is counted in `state.step` alone; the scale follows the gradients. `init_state` takes the same
    `loss_scale`.

    With `guard`, so does a step that the guard does not keep: `ft.train.skip_nonfinite()` skips one whose loss,
    gradient or new state is not finite, `skip_spikes()` also a loss that stands out; steps that are kept keep their
    bits. `init_state` takes the same `guard`. It does not count a step that overflows at a loss scale above 1, with a
    loss that is finite: a smaller scale mends that.

    With `trainable`, the other params are frozen: they keep their bits, weight decay or not, and no gradient of them is
    computed or held. It is what `tree.mask` takes, such as `"head/**"`, a list of such patterns of paths, or a
    predicate of (path, leaf), or a tree of bools like params or a prefix. The optimizer sees the trained params alone,
    under their paths. `init_state` takes the same `trainable`.

    Metrics: "loss" (total / weight), "weight", "grad_norm" (before the optimizer), and each of the loss's own divided
    by weight; with `loss_scale` also the "loss_scale" of this step; with either, "skipped", 0 or 1; with `guard`,
    "skipped_in_row", "skipped_in_all" and "rolled_back". All are () tensors, of a half-precision loss float32.

    A batch of weight 0 has no mean: loss and gradient are NaN, in which a loss scale or a guard skips the step.

    Raises: TypeError for a loss that is no Loss where slices are added, since the mean of each slice would count as
    much however few of its rows count, for arguments, a Loss or metrics of another kind, and for a loss that draws from
    torch's global generator, as its first call in eager tells; ValueError for a state made with other options or by
    another optimizer, a loss that writes into its batch, a metric with the name of one of the step's, and a
    `trainable` that fits no param.

    >>> step = ft.train_step(lambda params, x, key: (params["w"] - x) ** 2, ft.optim.sgd(0.25))
    >>> state = ft.init_state({"w": torch.tensor(0.0)}, ft.optim.sgd(0.25), key=ft.random.key(0))
    >>> step(state, torch.tensor(1.0))[1]
    {'loss': tensor(1.), 'weight': tensor(1.), 'grad_norm': tensor(2.)}
    """
    if not callable(loss_fn) or not hasattr(optimizer, "update"):
        came = f"({type(loss_fn).__name__}, {type(optimizer).__name__})"
        raise TypeError(f"train_step: expected (loss_fn, optimizer), a function and a pair of functions, came {came}")
    check_pairs("train_step", loss_scale, guard)
    begun = {
        "loss_scale": None if loss_scale is None else loss_scale.init("cpu"),
        "guard": None if guard is None else guard.init("cpu"),
    }
    # one part is no wish where rows are asked for
    parts = None if accumulate_rows is not None and accumulate == 1 else accumulate
    accumulation.check_parts("train_step: accumulate", parts, accumulate_rows)
    looped = parts != 1
    tx, split = with_extra_args_support(optimizer), splitting("train_step", trainable)
    wanted = "params, buffers, batch, key" if buffers else "params, batch, key"
    taken = ["loss", "weight", "grad_norm"]
    taken += [] if loss_scale is None else ["loss_scale"]
    taken += [] if loss_scale is None and guard is None else ["skipped"]
    taken += [] if guard is None else ["skipped_in_row", "skipped_in_all", "rolled_back"]

    def evaluated(params: Params, *args: Any) -> tuple[Loss, Tree]:
        result = checks.call("train_step", loss_fn, wanted, params, *args)
        if not buffers:
            return _loss(result, looped, taken), None
        if isinstance(result, Loss) or not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                "train_step(buffers=True): expected loss_fn to return (loss, new_buffers), came "
                f"{type(result).__name__}; return the buffers unchanged where nothing updates them"
            )
        return _loss(result[0], looped, taken), result[1]

    # one slice's gradient is that of its mean times the scale: of a size that does not depend on how many slices
    # there are, so that float16 holds it with the same scale
    def scaled(trained: Params, frozen: Params, scale: Tensor | None, *args: Any) -> tuple[Tensor, tuple[Loss, Tree]]:
        *others, key, step = args
        loss, new = evaluated(whole(trained, frozen), *others, key if step is None else random.fold_in(key, step))
        if not looped:
            total = loss.total / loss.weight
        else:
            total = loss.total if scale is None else loss.total / _divisor(loss)
        return total if scale is None else total * scale.to(total.dtype), (loss, new)

    gradient = transforms.value_and_grad(scaled, has_aux=True)
    add_gradients = transforms.gradient.add_gradients(
        scaled, has_aux=True, factor_of=None if loss_scale is None else lambda result: _divisor(result[1][0])
    )

    def add_slice(
        total: list[Tensor], trained: Params, inputs: tuple[Params, Tensor | None, Tree], batch: Batch, key: Tensor
    ) -> Any:
        frozen, scale, old = inputs
        _, (loss, new) = add_gradients(total, trained, frozen, scale, *((old,) if buffers else ()), batch, key, None)
        return loss, (frozen, scale, new)

    of_slices = accumulation.sums(add_slice, parts, rows=accumulate_rows, buffers=True)

    def gradients(state: TrainState, batch: Batch) -> _Found:
        _check_state(state, begun, buffers)
        trained, frozen = split(state.params)
        check_marks("train_step", state, trained, trainable)
        scale = None if loss_scale is None else state.loss_scale.scale
        if not looped:  # the key is folded where it is compiled with the loss
            args = (*((state.buffers,) if buffers else ()), batch, state.key, state.step)
            (_, (loss, new)), grads = gradient(trained, frozen, scale, *args)
            return _Found(loss, new, grads)
        key = random.fold_in(state.key, state.step)
        (loss, (*_, new)), grads = of_slices(trained, (frozen, scale, state.buffers), batch, key)
        return _Found(loss, new, grads)

    def update(state: TrainState, found: _Found) -> tuple[TrainState, Metrics]:
        loss, new_buffers, grads = found
        trained, frozen = split(state.params)
        loss = tree.map(lambda leaf: wide(leaf) if isinstance(leaf, Tensor) else leaf, loss)
        if looped:
            share = 1 / loss.weight
            grads = tree.map(lambda grad: grad * share.to(grad.dtype), grads, by_kind=True)
        if loss_scale is None:
            grads = tree.map(lambda grad, leaf: grad.to(leaf.dtype), grads, trained, by_kind=True)
        else:
            grads = unscale(grads, state.loss_scale.scale)
        mean = loss.total / loss.weight
        updates, opt_state = checks.update("train_step", tx, grads, state.opt_state, trained, value=mean)
        metrics = {name: value / loss.weight for name, value in loss.metrics.items()}
        metrics |= {"loss": mean, "weight": loss.weight, "grad_norm": tree.norm(grads)}
        new = state._replace(
            step=state.step + 1,
            params=apply_updates(trained, updates),
            opt_state=opt_state,
            buffers=new_buffers,
        )
        if loss_scale is None and guard is None:
            return new._replace(params=whole(new.params, frozen)), metrics
        good = finite(grads)
        if loss_scale is not None:  # a scale follows the gradients alone: no other one mends an update
            new = new._replace(loss_scale=loss_scale.update(state.loss_scale, good))
            # cloned: a donated state's scale is overwritten
            metrics["loss_scale"] = state.loss_scale.scale.clone()
        old = trained, state.opt_state, state.buffers
        good = good & stays_finite(old, (new.params, opt_state, new_buffers))
        if guard is not None:
            good, judged = guard.judge(state.guard, metrics["loss"], good & torch.isfinite(metrics["loss"]))
            if loss_scale is not None:
                judged = tree.where(is_overflow(state.loss_scale, new.loss_scale, mean), state.guard, judged)
            new = new._replace(guard=judged)
            metrics |= {"skipped_in_row": judged.in_row.clone(), "skipped_in_all": judged.skipped.clone()}
            metrics["rolled_back"] = judged.rolled_back.clone()
        kept = tree.where(good, (new.params, opt_state, new_buffers), old)
        new = new._replace(params=whole(kept[0], frozen), opt_state=kept[1], buffers=kept[2])
        return new, metrics | {"skipped": (~good).float()}

    # of all params, as what begins a lane of a sweep has them
    kept_by = optimizer if trainable is None else of_trained(optimizer, split)
    return OptimizerStep(checks.watched("train_step", gradients), update, kept_by)


def _divisor(loss: Loss) -> Tensor:
    # near the weight, so that the quotient is of the size of a mean; a slice whose mask is all zero has none, and a
    # total of 0, and by less than this the sum of other slices would overflow
    return torch.where(loss.weight == 0, 1.0, loss.weight.abs().clamp(min=1e-6))


def _loss(result: Any, looped: bool, taken: Collection[str]) -> Loss:
    if isinstance(result, Loss):
        if not isinstance(result.weight, Tensor) or result.weight.dim() != 0:
            came = tuple(result.weight.shape) if isinstance(result.weight, Tensor) else repr(result.weight)
            raise TypeError(
                f"train_step: expected a Loss whose weight is a () tensor, came {came}; write torch.sum(mask), or "
                "total.new_tensor(count)"
            )
        return result._replace(metrics=checks.metrics("train_step", result.metrics, taken))
    value, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if not isinstance(value, Tensor):
        raise TypeError(
            f"train_step: expected loss_fn to return a Loss, a tensor, or (tensor, dict of metrics), came {result!r}"
        )
    if looped:
        raise TypeError(
            "train_step: expected loss_fn to return a Loss where slices of the batch are added, came a tensor, whose "
            "weight nobody knows: the mean of a slice with few rows or a mask would count as much as any other; return "
            "ft.Loss(sum of the losses, how many they are, {})"
        )
    return Loss(value, torch.ones((), device=value.device), checks.metrics("train_step", metrics, taken))


def _check_state(state: TrainState, begun: dict[str, Tree], buffers: bool) -> None:
    if not isinstance(state, TrainState):
        raise TypeError(
            f"train_step: expected (state, batch) with a state of init_state, came {type(state).__name__} first"
        )
    for name, ours in begun.items():
        theirs, words = getattr(state, name), name.replace("_", " ")
        if (theirs is None) != (ours is None):
            there, here = ("no", "one") if theirs is None else ("one", "none")
            raise ValueError(
                f"train_step: the state has {there} {words} and the step {here}; give init_state and "
                f"train_step the same {name}"
            )
        if _fields(theirs) != _fields(ours):
            raise ValueError(
                f"train_step: expected a state whose {words} has {_fields(ours)}, came one with {_fields(theirs)}; "
                f"give init_state and train_step the same {name}"
            )
    if not buffers and tree.leaves(state.buffers):
        raise ValueError(
            "train_step: the state has buffers that the step does not update; pass buffers=True, and take them as the "
            "second argument of loss_fn"
        )


def _fields(state: Tree) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in tree.items(state)}
