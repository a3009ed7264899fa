"""Laws of a function that may be run another way: mapped, traced, compiled, or stopped and started again."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functrain import checkpoint, tree
from functrain.compiler import compilation
from functrain.optim import apply_updates
from functrain.testing.counting import assert_max_traces
from functrain.testing.law import STEPS, Law, Subject, Trial, check_close, check_equal
from functrain.testing.strategies import fill
from functrain.transforms import vmap
from functrain.tree import Tree

LANES = 3
RATES = (0.001, 0.02, 0.3)  # of the lanes


def vmapped(subject: Subject, trial: Trial) -> None:
    """A lane of a mapped trajectory is the trajectory alone, to rounding."""
    tx = subject.build()
    lanes = [trial.params, *(fill(trial.params, trial.seed + lane) for lane in range(1, LANES))]
    grads = [subject.grads(Trial(trial.params, trial.seed + lane), 2) for lane in range(LANES)]
    together = _mapped(lambda params, grads: subject.run(tx, params, grads), lanes, grads)
    for lane in range(LANES):
        check_close(
            together[lane], subject.run(tx, lanes[lane], grads[lane]), subject.rtol, f"lane {lane} of {LANES}: "
        )


def vmapped_rate(subject: Subject, trial: Trial) -> None:
    """A lane of a trajectory that is mapped over the hyper-parameter is the one with that number, to rounding."""
    assert subject.of_rate is not None
    make, grads = subject.of_rate, subject.grads(trial, 2)
    rates = [torch.tensor(rate) for rate in RATES]
    together = _mapped(lambda rate: subject.run(make(rate), trial.params, grads), rates)
    for lane, rate in enumerate(RATES):
        # the rate may go through 1 - rate, in float32 here and in float64 there: 1e-3 has 6e-5 of that
        check_close(together[lane], subject.run(make(rate), trial.params, grads), 10 * subject.rtol, f"rate {rate}: ")


def traced(subject: Subject, trial: Trial) -> None:
    """The operations that are seen when `update` runs on tensors without data make the same bits as `update`."""
    _check_traced(subject, trial, traces=STEPS)


def traced_once(subject: Subject, trial: Trial) -> None:
    """A step is traced once, and never again for another step."""
    _check_traced(subject, trial, traces=1)


def compiled(subject: Subject, trial: Trial) -> None:
    """`ft.compile(update)` is `update`, to rounding."""
    tx = subject.build()

    def step(grads: Tree, state: Tree, params: Tree) -> Any:
        return subject.update(tx, grads, state, params)

    program = compilation.compile(step)
    state = tx.init(trial.params)
    for number, grads in enumerate(subject.grads(trial, 2)):
        want = step(grads, state, trial.params)
        check_close(program(grads, state, trial.params), want, subject.rtol, f"compiled, step {number}: ")
        state = want[1]


def saved(subject: Subject, trial: Trial) -> None:
    """A state that was saved, and loaded where `init` was given other params, goes on with the same bits."""
    grads = subject.grads(trial, 4)
    tx = subject.build()
    half = subject.run(tx, trial.params, grads[:2])
    kept = subject.run(tx, trial.params, grads, half)
    anew = subject.build()
    like = anew.init(fill(trial.params, trial.seed + 1))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder) / "state", half.state)
        loaded = checkpoint.load(Path(folder) / "state", like=like)
    check_equal(loaded, half.state, "the state that was loaded: ")
    check_equal(subject.run(anew, trial.params, grads, half._replace(state=loaded)), kept, "two steps later: ")


def _check_traced(subject: Subject, trial: Trial, traces: int) -> None:
    tx = subject.build()

    def step(grads: Tree, state: Tree, params: Tree) -> Any:
        return subject.update(tx, grads, state, params)

    program = compilation.interpret(assert_max_traces(traces)(step))
    state, params = tx.init(trial.params), trial.params
    for number, grads in enumerate(subject.grads(trial)):
        want = step(grads, state, params)
        check_equal(program(grads, state, params), want, f"traced, step {number}: ")
        state, params = want[1], apply_updates(params, want[0])


def _mapped(fn: Any, *lanes: list[Tree]) -> list[Tree]:
    """Return `fn` of each lane, run as one mapped function; its results that are no tensors are those of any lane."""
    rows = [tree.flatten(row) for row in zip(*lanes, strict=True)]
    structure = rows[0][1]
    found: list[Any] = []

    # flat lists in and out: torch's own trees know neither None nor our dataclasses
    def flat(*leaves: Tensor) -> list[Tensor]:
        made, structure_made = tree.flatten(fn(*tree.unflatten(structure, leaves)))
        found[:] = [made, structure_made]
        return [leaf for leaf in made if isinstance(leaf, Tensor)]

    stacked = [torch.stack(column) for column in zip(*[leaves for leaves, _ in rows], strict=True)]
    tensors = vmap(flat)(*stacked) if stacked else []
    results = []
    for lane in range(len(rows)):
        rest = iter([leaf[lane] for leaf in tensors])
        results.append(tree.unflatten(found[1], [next(rest) if isinstance(x, Tensor) else x for x in found[0]]))
    return results


LAWS = [
    Law(vmapped, "compute with tensors alone: no `if` on a value, no item(), no write to an argument"),
    Law(saved, "keep everything that a later step needs in leaves of the state"),
]
RATE_LAW = Law(vmapped_rate, "take the hyper-parameter as a tensor too: no float(rate), no `if rate`")
TRACED = [
    Law(traced, "read no tensor back to the host (no item(), no `if` on a value), and use torch's operations alone"),
    Law(traced_once, "keep numbers that change in tensors, and shapes, dtypes and strides the same from step to step"),
]
COMPILED = Law(compiled, "compute in float32 where a sum of short floats would lose digits")
