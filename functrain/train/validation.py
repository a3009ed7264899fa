"""Validation while a run goes on: a hook that evaluates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from functrain.compiler.cxx import check_compiler
from functrain.sharding import Plan
from functrain.train.evaluation import check_arguments, evaluate
from functrain.train.hooks import Metrics
from functrain.train.predictions import Metric
from functrain.train.state import TrainState
from functrain.tree import Params


def validate(
    loss_fn: Callable[..., Any],
    batches: Any,
    *,
    name: str = "validation",
    params: Callable[[TrainState], Params] | None = None,
    buffers: bool = False,
    metrics: Mapping[str, Metric | Callable[..., Any]] | None = None,
    predict: Callable[..., Any] | None = None,
    compile: bool = True,
    progress: Callable[[int, int | None], object] | None = None,
    plan: Plan | None = None,
) -> Callable[[int, TrainState, Metrics], dict[str, float]]:
    """Return a hook for `fit` that adds `ft.evaluate` of the state to the metrics, as "validation_loss" and so on.

    Every n steps by `ft.train.every(n, ft.train.validate(loss_fn, batches))`, and at no others: the last step counts
    where it is a multiple of n. All other hooks of that step see the numbers, wherever they stand in the list. Nothing
    of training changes by it, to the bit.

    `params(state)` says what is evaluated where it is not `state.params`, such as an average of them that the optimizer
    keeps. With `buffers`, as in `ft.train_step`, the loss takes `state.buffers` too. The other arguments are those of
    `ft.evaluate`; batches must be such as can be gone through again.

    Raises: CompilerNotFoundError at once; TypeError for an iterator, which would be at its end the second time, and
    what `ft.evaluate` raises; from the hook, ValueError for the lanes of a sweep.

    >>> loss_fn = lambda params, batch, key: torch.mean((batch["x"] - params["w"]) ** 2)
    >>> hook = ft.train.validate(loss_fn, [{"x": torch.tensor([1.0, 2.0])}], compile=False)
    >>> state = ft.init_state({"w": torch.tensor(0.0)}, ft.optim.sgd(0.25), key=ft.random.key(0))
    >>> hook(10, state, {})  # as ft.fit does with every=[ft.train.every(10, hook)]
    {'validation_loss': 2.5}
    """
    check_arguments("validate", loss_fn, batches, metrics, predict)
    if isinstance(batches, Iterator):
        raise TypeError(
            "validate: expected batches that can be gone through each time, came the iterator "
            f"{type(batches).__name__}, which is at its end after the first; pass a list, a DataLoader or "
            "ft.data.evaluation_windows"
        )
    if compile and not torch.cuda.is_available():  # not at the first validation, when a run has gone on for a while
        check_compiler("validate", "pass compile=False: it evaluates in eager")

    def hook(t: int, state: TrainState, others: Metrics) -> dict[str, float]:
        if state.step.dim() > 0:
            raise ValueError(
                "validate: expected the state of one run, came the lanes of a sweep; in a hook of your own, evaluate "
                "swept.lane(state, i) for each"
            )
        found = evaluate(
            loss_fn,
            state.params if params is None else params(state),
            batches,
            buffers=state.buffers if buffers else None,
            metrics=metrics,
            predict=predict,
            compile=compile,
            progress=progress,
            plan=plan,
        )
        return {f"{name}_{key}": value for key, value in found.items()}

    vars(hook)["measures"] = True
    return hook
