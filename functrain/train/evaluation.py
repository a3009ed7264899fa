"""A loss and its metrics over a finite row of batches, such as the validation or test set. B rows of a batch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from functrain import data, transforms, tree
from functrain.compiler.cxx import CompilerNotFoundError
from functrain.losses import Loss
from functrain.sharding import Plan
from functrain.train import checks
from functrain.train.loop_checks import is_indexed
from functrain.train.predictions import Metric, Predictions
from functrain.train.ranks import Bound, dealt, gathered
from functrain.transforms.loss_scale import wide
from functrain.tree import Batch, Params, Tree


class EvaluationInterrupted(KeyboardInterrupt):
    """What `evaluate` raises at Ctrl-C: with the `metrics` of the first `done` batches, of `of` where that is known.

    >>> def loss_fn(params, batch, key):
    ...     if batch > 1:
    ...         raise KeyboardInterrupt  # as Ctrl-C does
    ...     return ft.Loss(batch, torch.tensor(1.0), {})
    >>> try:
    ...     ft.evaluate(loss_fn, {}, [torch.tensor(1.0), torch.tensor(2.0)], compile=False)
    ... except ft.train.EvaluationInterrupted as stopped:
    ...     print(stopped.metrics, stopped.done, stopped.of)
    {'loss': 1.0} 1 2
    """

    def __init__(self, metrics: dict[str, float], done: int, of: int | None) -> None:
        super().__init__()
        self.metrics, self.done, self.of = metrics, done, of


_AT_ONCE = 256  # batches whose sums wait on the device, so that its queue of work and their memory stay short


def evaluate(
    loss_fn: Callable[..., Any],
    params: Params,
    batches: Any,
    *,
    buffers: Tree = None,
    metrics: Mapping[str, Metric | Callable[..., Any]] | None = None,
    predict: Callable[..., Any] | None = None,
    compile: bool = True,
    progress: Callable[[int, int | None], object] | None = None,
    plan: Plan | None = None,
) -> dict[str, float]:
    """Compute the mean loss and metrics over all batches: "loss", and each of the loss's own metrics.

    `loss_fn` is that of `ft.train_step`, called without a gradient and with `key=None`, which means evaluation: it must
    draw nothing then, as dropout of `ft.models.gpt2` does not. With `buffers` it is `loss_fn(params, buffers, batch,
    key)`, and the buffers that it returns are dropped. For a torch module, let it call `net.evaluate if key is None
    else net.apply`, where `net` is what `ft.from_module` returned.

    Of a `Loss` totals, weights and metrics are added: equals the loss of all batches as one, whatever their sizes and
    masks. A () tensor, or (tensor, metrics), counts as the mean over the rows of its batch, so it is weighted by the
    first dimension of the batch's leaves: right for a short last batch, and wrong for a mean over a mask, which has to
    be a Loss. Sums are in float64.

    What is no sum, such as AUC or F1, goes into `metrics`, by name: an object with `update`, `compute` and `reset`, as
    those of torchmetrics; or a function to a number of the predictions of all batches, as those of scikit-learn, which
    are kept until then on the CPU, as tensors. `predict(params, batch)`, or `predict(params, buffers, batch)`, returns
    their arguments, a tensor, tuple or dict of tensors (B, ...); sizes that depend on values want `compile=False`.

    Compiled once for each shape of a batch, so a short last batch compiles a second time. The programs of the eight
    functions used last are kept, so pass the same function again and not a new lambda. `progress(done, of)` is called
    before the first batch and after each; `of` is None where batches have no length.

    With `plan`, whose params may be split, every rank must call it, with the same batches, whole ones: they are dealt
    out to the ranks, one after another. Without, where torch.distributed runs, all ranks must call it too, each with
    its batches, as `ft.data.shard` makes them. Either way all return the numbers over all. Objects are left to add up
    themselves, as those of torchmetrics do.

    Ctrl-C raises `EvaluationInterrupted`, a KeyboardInterrupt, with the loss and its metrics on the batches until then,
    of this rank alone.

    Raises: CompilerNotFoundError on a machine without a C++ compiler, where `compile=False` evaluates; ValueError for
    no batches or endless ones, weights that add up to 0, rows that are not known, and metrics
    without predict; TypeError for arguments, a loss or a metric of another kind.

    >>> loss_fn = lambda params, batch, key: torch.mean((batch["x"] - params["w"]) ** 2)
    >>> batches = [{"x": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([2.0])}]  # means of 2.5 and 4, of 2 rows and 1
    >>> ft.evaluate(loss_fn, {"w": torch.tensor(0.0)}, batches, compile=False)
    {'loss': 3.0}
    """
    check_arguments("evaluate", loss_fn, batches, metrics, predict)
    has_buffers = buffers is not None
    bound = Bound.of(params, plan)
    measured = (_compiled if compile else _measured)(loss_fn, predict, has_buffers, bound)
    given = (params, buffers) if has_buffers else (params,)
    batches, uncounted = dealt(batches, plan, together=bound.spread is not None)
    device = next((leaf.device for leaf in tree.leaves(params) if isinstance(leaf, Tensor)), torch.device("cpu"))
    sums, predictions = _Sums(), Predictions("evaluate", metrics or {})
    of = len(batches) if hasattr(batches, "__len__") else None
    with torch.no_grad():
        if progress is not None:
            progress(0, of)
        try:
            for done, batch in enumerate(_moved(batches, device), 1):
                _check_tensors(batch, done)
                found, arguments = measured(*given, batch)
                if done == uncounted:  # another rank's: this one takes part in what gathers
                    break
                sums.add(found)
                predictions.add(arguments)
                if progress is not None:
                    progress(done, of)
        except CompilerNotFoundError as error:
            raise CompilerNotFoundError("evaluate", "pass compile=False: it evaluates in eager") from error
        except KeyboardInterrupt:
            raise EvaluationInterrupted(sums.here(), sums.done, of) from None
        means = sums.means()
        return means | predictions.compute(means)


def check_arguments(what: str, loss_fn: Any, batches: Any, metrics: Any, predict: Any) -> None:
    """Raise a TypeError or ValueError for what cannot be evaluated, before anything is."""
    if not callable(loss_fn):
        raise TypeError(f"{what}: expected loss_fn(params, batch, key) first, came {type(loss_fn).__name__}")
    one = isinstance(batches, (Mapping, Tensor, np.ndarray, str)) or (
        isinstance(batches, tuple) and any(isinstance(x, (Tensor, np.ndarray)) for x in batches)
    )
    if one or not (hasattr(batches, "__iter__") or is_indexed(batches)):
        raise TypeError(f"{what}: expected batches, came a {type(batches).__name__}; write [batch] for one batch")
    if is_indexed(batches) and not hasattr(batches, "__len__"):
        raise ValueError(
            f"{what}: expected batches that come to an end, came {type(batches).__name__}, which has no length; take "
            "ft.data.evaluation_windows, or [batches[t] for t in range(n)]"
        )
    if metrics and predict is None:
        raise ValueError(
            f"{what}: expected predict(params, batch), which gives the metrics {', '.join(metrics)} their arguments, "
            "came none"
        )
    if predict is not None and not metrics:
        raise ValueError(f"{what}: expected metrics={{name: metric}} for what predict returns, came none")


def _measured(
    loss_fn: Callable[..., Any], predict: Callable[..., Any] | None, buffers: bool, bound: Bound
) -> Callable[..., Any]:
    wanted = "params, buffers, batch, key" if buffers else "params, batch, key"

    def measured(params: Params, *args: Any) -> tuple[dict[str, Tensor], Any]:
        with bound.entered():
            return with_params(bound(params), *args)

    def with_params(*args: Any) -> tuple[dict[str, Tensor], Any]:
        try:
            result = checks.call("evaluate", loss_fn, wanted, *args, None)
        except Exception as error:
            error.add_note(
                "ft.evaluate calls the loss with key=None, which means evaluation: it must draw nothing then"
            )
            raise
        if buffers:
            if isinstance(result, Loss) or not isinstance(result, tuple) or len(result) != 2:
                raise TypeError(
                    "evaluate(buffers=...): expected loss_fn to return (loss, new_buffers), as for train_step, came "
                    f"{type(result).__name__}"
                )
            result = result[0]
        loss = _loss(result, args[-1])
        found = {"loss": loss.total, "weight": loss.weight, **loss.metrics}
        return {name: wide(value) for name, value in found.items()}, None if predict is None else predict(*args)

    return measured


_programs: OrderedDict[Any, tuple[Any, Callable[..., Any]]] = OrderedDict()


def _compiled(
    loss_fn: Callable[..., Any], predict: Callable[..., Any] | None, buffers: bool, bound: Bound
) -> Callable[..., Any]:
    try:
        key: Any = (loss_fn, predict, buffers, bound)
        hash(key)
    except TypeError:  # kept beside its programs, so that no other function gets its number
        key = (id(loss_fn), id(predict), buffers, bound)
    if key not in _programs:
        _programs[key] = (loss_fn, predict), transforms.compile(_measured(loss_fn, predict, buffers, bound))
    _programs.move_to_end(key)
    while len(_programs) > 8:
        _programs.popitem(last=False)
    return _programs[key][1]


def _loss(result: Any, batch: Batch) -> Loss:
    if isinstance(result, Loss):
        if not isinstance(result.weight, Tensor) or result.weight.dim() != 0:
            raise TypeError(f"evaluate: expected a Loss whose weight is a () tensor, came {result.weight!r}")
        return result._replace(metrics=checks.metrics("evaluate", result.metrics, ["loss", "weight"]))
    value, given = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if not isinstance(value, Tensor) or value.dim() != 0:
        came = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(result)
        raise TypeError(
            f"evaluate: expected loss_fn to return a Loss, a () tensor, or (tensor, dict of metrics), came {came}"
        )
    rows = {leaf.shape[0] if leaf.dim() else None for leaf in tree.leaves(batch) if isinstance(leaf, Tensor)}
    if len(rows) != 1 or None in rows:
        raise ValueError(
            f"evaluate: expected a Loss, or a batch whose leaves have one first dimension, by which the mean is "
            f"weighted, came leaves of {sorted(map(str, rows))} rows; return ft.Loss(sum, count, {{}})"
        )
    weight = torch.full((), float(rows.pop() or 0), device=value.device)
    found = checks.metrics("evaluate", given, ["loss", "weight"])
    return Loss(wide(value) * weight, weight, {name: wide(metric) * weight for name, metric in found.items()})


def _check_tensors(batch: Batch, number: int) -> None:
    for path, leaf in tree.items(batch):
        if isinstance(leaf, np.ndarray):
            where = f"batch {number}: {path}" if path else f"batch {number}"
            raise TypeError(
                f"evaluate: {where}: expected a tensor, came an array of numpy; make it one by torch.from_numpy"
            )


def _moved(batches: Any, device: torch.device) -> Iterator[Batch]:
    if is_indexed(batches):
        yield from data.prefetch(batches, 0, len(batches), device=None if device.type == "cpu" else device)
        return
    for batch in batches:
        yield tree.map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)


class _Sums:
    """Sums by name, in float64, of tensors that the device need not have computed yet."""

    def __init__(self) -> None:
        self._waiting: list[dict[str, Tensor]] = []
        self._sums: dict[str, float] | None = None
        self._read_of = 0  # batches whose sums these are

    def add(self, found: dict[str, Tensor]) -> None:
        if self._waiting and found.keys() != self._waiting[0].keys():
            raise ValueError(
                f"evaluate: expected the metrics {', '.join(self._waiting[0])} of each batch, came {', '.join(found)}"
            )
        self._waiting.append(found)
        if len(self._waiting) == _AT_ONCE:
            self._read()

    @property
    def done(self) -> int:
        return self._read_of + len(self._waiting)

    def means(self) -> dict[str, float]:
        self._read()
        sums = _of_all_ranks(self._sums)
        if sums is None:
            raise ValueError("evaluate: expected at least one batch, came none")
        if sums["weight"] == 0:
            raise ValueError("evaluate: the weights of all batches add up to 0, of which there is no mean")
        return _means(sums)

    def here(self) -> dict[str, float]:
        """Return the means of this process so far; empty where there is none."""
        self._read()
        return {} if self._sums is None or self._sums["weight"] == 0 else _means(self._sums)

    def _read(self) -> None:
        waiting = self._waiting
        if not waiting:
            return
        names = list(waiting[0])
        # float64 on the host: not every device has it
        columns = [torch.stack([found[name] for found in waiting]).cpu().double().sum() for name in names]
        before = self._sums or dict.fromkeys(names, 0.0)
        new = {name: before[name] + float(column) for name, column in zip(names, columns, strict=True)}
        # together, so that Ctrl-C counts no batch twice
        self._sums, self._read_of, self._waiting = new, self._read_of + len(waiting), []


def _means(sums: dict[str, float]) -> dict[str, float]:
    return {name: value / sums["weight"] for name, value in sums.items() if name != "weight"}


def _of_all_ranks(sums: dict[str, float] | None) -> dict[str, float] | None:
    # objects and not one tensor: a rank without a batch does not know the names
    there = [one for one in gathered(sums) if one is not None]
    if len({tuple(one) for one in there}) > 1:
        raise ValueError(f"evaluate: expected the same metrics in all ranks, came {[list(one) for one in there]}")
    return {name: sum(one[name] for one in there) for name in there[0]} if there else None
