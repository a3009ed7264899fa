"""Laws of gradient transformations, checked on drawn trees: `check(tx)` in a test is a test of `tx`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from functrain import tree
from functrain.optim import GradientTransformation, Updates
from functrain.testing import algebra, declared, edges, execution, purity, steps, strategies
from functrain.testing.law import RATE, Law, LawError, Subject, Trial, error_of, shown
from functrain.testing.searching import SearchStrategy, exists, trials_on
from functrain.train import TrainState
from functrain.tree import Batch, Params, elsewhere

__all__ = ["LAWS", "STEP_LAWS", "Law", "LawError", "check", "check_step"]

LAWS: dict[str, Law] = {
    law.name: law
    for law in [
        *purity.LAWS,
        *algebra.LAWS,
        *execution.LAWS,
        *edges.LAWS,
        execution.RATE_LAW,
        algebra.LEAFWISE,
        declared.BOUNDED,
        declared.DEBIASED,
        declared.DESCENDS,
        declared.DIFFERENTIABLE,
        *execution.TRACED,
        execution.COMPILED,
    ]
}
STEP_LAWS: dict[str, Law] = {law.name: law for law in [*steps.LAWS, steps.SPLIT]}
_SLOW = {"saved", "traced", "traced_once"}  # files, and the tracer: a fifth of the examples


def check(
    transform: GradientTransformation | Callable[[Any], GradientTransformation],
    *,
    params: SearchStrategy[Params] | Params = None,
    gradients: Callable[[Params, int], Updates] = strategies.fill,
    extra_args: Callable[[int], Mapping[str, Any]] = lambda step: {},
    leafwise: bool = False,
    debiased: bool = False,
    descends: bool = False,
    differentiable: bool = False,
    bounded: tuple[Callable[[Updates], Any], float] | None = None,
    compiled: bool = True,
    without: Collection[str] = (),
    examples: int = 20,
    rtol: float = 1e-5,
) -> list[str]:
    """Check every law on `transform`, and return the names of those that were checked; the table is in docs/testing.md.

    `transform` is a transformation, or a function that makes one of a learning rate (or any other number), which is
    then also given as a tensor, mapped over and differentiated through. `params` is a strategy or one tree, instead of
    `strategies.params()`; `gradients` makes the updates that go in, of params and a seed; `extra_args` the keyword
    arguments of a step. What holds of some transformations only is declared: `leafwise`, `debiased`, `descends`,
    `differentiable`, `bounded=(measure, bound)` as in `bounded=(ft.tree.norm, 1.0)`.

    `compiled=False` leaves out the compiler, which takes seconds, and keeps the tracer. `without` names laws that
    `transform` is not meant to keep. `rtol` is how far results may be off, of a leaf's largest element, where
    operations are done in another order. The trees are the same ones at every run.

    Raises: LawError naming the law, the leaf, and the smallest tree that was found; ValueError for an unknown law.
    """
    _check_known(without, LAWS)
    of_rate: Any = None if hasattr(transform, "init") and hasattr(transform, "update") else transform
    asked = {
        "vmapped_rate": of_rate is not None,
        "leafwise": leafwise,
        "debiased": debiased,
        "descends": descends,
        "differentiable": differentiable,
        "bounded": bounded is not None,
        "compiled": compiled,
    }
    names = [name for name in LAWS if asked.get(name, True) and name not in without]
    build: Any = (lambda: transform) if of_rate is None else (lambda: of_rate(RATE))
    subject = Subject(build, of_rate, gradients, extra_args, rtol, bounded)
    trials = trials_on(strategies.params() if params is None else params)
    largest: list[Trial] = []

    quick = [LAWS[name] for name in names if name not in _SLOW and name != "compiled"]
    slow = [LAWS[name] for name in names if name in _SLOW]
    _check(quick, subject, trials, examples, largest)
    _check(slow, subject, trials, max(2, examples // 5), largest)
    if "compiled" in names:
        error = _error(LAWS["compiled"], subject, largest[0])
        if error is not None:
            raise error
    return names


def check_step(
    step: steps.Step,
    state: TrainState,
    batch: Batch,
    *,
    split: Callable[[int], steps.Step] | None = None,
    compiled: bool = True,
    without: Collection[str] = (),
    rtol: float = 1e-4,
) -> list[str]:
    """Check every law on a step of `ft.train_step`, or one like it, from this state, and return the names of those
    that were checked.

    `split` makes the same step on a number of slices, as `lambda parts: ft.train_step(loss, tx, accumulate=parts)`
    does; a loss without random numbers then makes the same new state. `compiled=False` leaves out the compiler. `rtol`
    is how far results may be off, of a leaf's largest element, where operations are done in another order. Neither
    `state` nor `batch` is changed.

    Raises: LawError naming the law and the leaf; ValueError for an unknown law.
    """
    _check_known(without, STEP_LAWS)
    asked = {"donated_step": compiled, "split_step": split is not None}
    names = [name for name in STEP_LAWS if asked.get(name, True) and name not in without]
    subject = steps.StepSubject(step, state, batch, split, rtol)
    on = f"on params {shown(state.params)} and a batch {shown(batch)}"
    for law in [STEP_LAWS[name] for name in names]:
        error = error_of(law, lambda law=law: law.holds(subject), state.params, on)  # type: ignore[misc]
        if error is not None:
            raise error
    return names


def _check_known(names: Collection[str], laws: Mapping[str, Law]) -> None:
    unknown = sorted(set(names) - set(laws))
    if unknown:
        raise ValueError(f"laws: without: expected names of laws, came {unknown}; there are {', '.join(laws)}")


def _check(
    laws: Sequence[Law], subject: Subject, trials: SearchStrategy[Trial], examples: int, largest: list[Trial]
) -> None:
    """Raise the LawError of the first law that a trial breaks, with the smallest trial that breaks it."""
    found: list[LawError] = []

    def breaks(trial: Trial, laws: Sequence[Law] = laws) -> bool:
        if not largest or len(tree.leaves(trial.params)) > len(tree.leaves(largest[0].params)):
            largest[:] = [trial]
        for law in laws:
            error = _error(law, subject, trial)
            if error is not None:
                found.append(error)
                return True
        return False

    if exists(trials, breaks, examples, smallest=False):
        broken = LAWS[found[-1].law]
        exists(trials, lambda trial: breaks(trial, [broken]), examples, smallest=True)
        # a law of a transformation that is not deterministic may hold the second time: then the first tree counts
        raise found[-1]


def _error(law: Law, subject: Subject, trial: Trial) -> LawError | None:
    on = f"on params {shown(trial.params)} and gradients of seed {trial.seed}"
    # a law may differentiate; nothing else does
    with torch.set_grad_enabled(law.name == "differentiable"):
        return error_of(law, lambda: law.holds(subject, trial), trial.params, on)


elsewhere.furnish(__name__)
