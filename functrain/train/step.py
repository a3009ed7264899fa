"""Loss and optimizer make a step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, overload

import torch
from torch import Tensor

from functrain import random, transforms, tree
from functrain.losses import Loss
from functrain.optim import GradientTransformation, apply_updates, with_extra_args_support
from functrain.sharding import Plan
from functrain.sharding.pieces import local as parts_of
from functrain.sharding.pieces import placed_like, replicating, wrapped_like
from functrain.train import checks
from functrain.train.guard import Guard, is_overflow
from functrain.train.protocols import Batch, LossFn, LossFnWithBuffers
from functrain.train.state import TrainState, check_pairs
from functrain.train.step_parts import Found, Metrics, OptimizerStep, check_state, divisor_of, loss_of
from functrain.train.trainable import Trainable, check_marks, of_trained, splitting, whole
from functrain.transforms import accumulation
from functrain.transforms.loss_scale import LossScale, unscale, wide, wide_dtype
from functrain.tree import Params, Tree
from functrain.tree.reductions import finite, stays_finite


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
    plan: Plan | None = None,
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
    plan: Plan | None = None,
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
    plan: Plan | None = None,
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

    With `plan`, every rank calls the step with its own rows of a batch, as `ft.data.shard(batches, plan=plan)` gives
    them, and with the same state. It equals the step of the whole batch on one process: the loss must be a `Loss`,
    whose sums are added over ranks, as are the gradients, once after all slices. n ranks with `accumulate=k` draw as
    one process with `accumulate=n * k`. Floating-point buffers become their mean over ranks, other ones must be alike.

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
    if plan is not None and accumulate_rows is not None:
        raise ValueError(
            "train_step: expected accumulate beside a plan, came accumulate_rows, by which ranks with different rows "
            "would have different numbers of slices"
        )
    begun = {
        "loss_scale": None if loss_scale is None else loss_scale.init("cpu"),
        "guard": None if guard is None else guard.init("cpu"),
    }
    # one part is no wish where rows are asked for
    parts = None if accumulate_rows is not None and accumulate == 1 else accumulate
    accumulation.check_parts("train_step: accumulate", parts, accumulate_rows)
    looped = parts != 1
    added = looped or plan is not None  # sums, which are divided when all are there
    tx, split = with_extra_args_support(optimizer), splitting("train_step", trainable)
    wanted = "params, buffers, batch, key" if buffers else "params, batch, key"
    taken = ["loss", "weight", "grad_norm"]
    taken += [] if loss_scale is None else ["loss_scale"]
    taken += [] if loss_scale is None and guard is None else ["skipped"]
    taken += [] if guard is None else ["skipped_in_row", "skipped_in_all", "rolled_back"]

    def evaluated(params: Params, *args: Any) -> tuple[Loss, Tree]:
        result = checks.call("train_step", loss_fn, wanted, params, *args)
        if not buffers:
            return loss_of(result, added, taken), None
        if isinstance(result, Loss) or not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                "train_step(buffers=True): expected loss_fn to return (loss, new_buffers), came "
                f"{type(result).__name__}; return the buffers unchanged where nothing updates them"
            )
        return loss_of(result[0], added, taken), result[1]

    # one slice's gradient is that of its mean times the scale: of a size that does not depend on how many slices
    # there are, so that float16 holds it with the same scale
    def scaled(trained: Params, frozen: Params, scale: Tensor | None, spread: Any, *args: Any) -> Any:
        *others, key, step = args
        params = whole(trained, frozen) if plan is None else plan.bind(whole(trained, frozen), spread)
        loss, new = evaluated(params, *others, key if step is None else random.fold_in(key, step))
        divisor: Tensor | None = None
        if not added:
            divisor = loss.weight
        elif scale is not None:  # gradients of split leaves are added as they are made: in one unit on all ranks
            divisor = divisor_of(loss.weight if plan is None or spread is None else plan.mean(loss.weight.detach()))
        total = loss.total if divisor is None else loss.total / divisor
        if plan is not None and plan.duplicates > 1:  # what is differentiated is the sum over all ranks
            total = total / plan.duplicates
        if scale is None:
            return total, (loss, new, spread, None)
        return total * scale.to(total.dtype), (loss, new, spread, divisor)

    def over_ranks(result: Any, grads: Tree) -> tuple[Any, Tree]:
        if plan is None:
            return result, grads
        if loss_scale is not None:
            divisor = result[1][3]
            grads = tree.map(lambda grad: wide(grad) * divisor.to(wide_dtype(grad.dtype)), grads)
        return result, plan.sum_gradients(grads, result[1][2])

    gradient = transforms.gradient.value_and_grad_then(scaled, over_ranks)
    add_gradients = transforms.gradient.add_gradients(
        scaled, has_aux=True, factor_of=None if loss_scale is None else lambda result: result[1][3]
    )

    def add_slice(total: list[Tensor], trained: Params, inputs: tuple[Any, ...], batch: Batch, key: Tensor) -> Any:
        *fixed, old = inputs
        _, (loss, new, *_) = add_gradients(total, trained, *fixed, *((old,) if buffers else ()), batch, key, None)
        return loss, (*fixed, new)

    def first_slice(key: Tensor) -> Tensor:
        assert plan is not None
        return plan.place(key) * (parts or 1)

    several = plan is not None and plan.ranks > 1
    of_slices = accumulation.sums(
        add_slice, parts, rows=accumulate_rows, buffers=True, first=first_slice if several else None
    )

    def gradients(state: TrainState, batch: Batch) -> Found:
        check_state(state, begun, buffers, plan is not None)
        trained, frozen = split(state.params)
        check_marks("train_step", state, trained, trainable)
        scale = None if loss_scale is None else state.loss_scale.scale
        spread = None if plan is None else plan.spread(state.params)
        trained, frozen = parts_of(trained), parts_of(frozen)
        if not looped:  # the key is folded where it is compiled with the loss
            folded: tuple[Tensor, Tensor | None] = (state.key, state.step)
            if several:
                folded = random.fold_in(random.fold_in(state.key, state.step), first_slice(state.key)), None
            args = (*((state.buffers,) if buffers else ()), batch, *folded)
            (_, (loss, new, *_)), grads = gradient(trained, frozen, scale, spread, *args)
        else:
            key = random.fold_in(state.key, state.step)
            inputs = (frozen, scale, spread, state.buffers)
            (loss, (*_, new)), grads = of_slices(trained, inputs, batch, key)
            if plan is not None:
                grads = plan.sum_gradients(grads, spread)
        if plan is None:
            return Found(loss, new, grads)
        return Found(plan.sum(tree.map(lambda x: wide(x) if isinstance(x, Tensor) else x, loss)), plan.mean(new), grads)

    def in_mesh(state: TrainState, batch: Batch) -> Found:
        with nullcontext() if plan is None else plan.entered():
            return gradients(state, batch)

    def update(state: TrainState, found: Found) -> tuple[TrainState, Metrics]:
        if plan is None or plan.spread(state.params) is None:
            return updated(state, found)
        # leaves that are split are whole matrices for an optimizer, which DTensor computes by parts
        grads = wrapped_like(found.grads, split(state.params)[0])
        with replicating():
            new, metrics = updated(state, found._replace(grads=grads))
            return placed_like(new, state), plan.whole(metrics)

    def updated(state: TrainState, found: Found) -> tuple[TrainState, Metrics]:
        loss, new_buffers, grads = found
        trained, frozen = split(state.params)
        loss = tree.map(lambda leaf: wide(leaf) if isinstance(leaf, Tensor) else leaf, loss)
        if added:
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
    return OptimizerStep(checks.watched("train_step", in_mesh), update, kept_by, plan)
