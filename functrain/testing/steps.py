"""Laws of a training step."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain import checkpoint, transforms, tree
from functrain.compiler import compilation
from functrain.testing.counting import assert_max_traces
from functrain.testing.law import Broken, Law, check_close, check_equal, check_like, cloned
from functrain.train import TrainState
from functrain.tree import Batch

Step = Callable[[TrainState, Batch], tuple[TrainState, Any]]


class StepSubject(NamedTuple):
    """A step under test, with what it is run on."""

    step: Step
    state: TrainState
    batch: Batch
    split: Callable[[int], Step] | None  # the same step on that many slices of a batch
    rtol: float


def pure_step(subject: StepSubject) -> None:
    """Calling a step twice gives the same bits, leaves its arguments as they were, and draws no global random
    number."""
    state, batch = cloned(subject.state), cloned(subject.batch)
    before = torch.get_rng_state()
    first = subject.step(state, batch)
    made = cloned(first)
    check_equal(state, subject.state, "the argument state: ")
    check_equal(batch, subject.batch, "the argument batch: ")
    check_equal(subject.step(state, batch), made, "a second call: ")
    check_equal(first, made, "what the first call returned, after another one: ")
    if not torch.equal(torch.get_rng_state(), before):
        raise Broken("", "torch's global random numbers were drawn")


def kept_step(subject: StepSubject) -> None:
    """The new state has the structure, shapes and dtypes of the old one, and counts one step more."""
    new, _ = subject.step(subject.state, subject.batch)
    check_like(new, subject.state)
    check_equal(new.step, subject.state.step + 1, "step: ")


def resumed_step(subject: StepSubject) -> None:
    """A state that was saved and loaded goes on with the same bits."""
    state, _ = subject.step(subject.state, subject.batch)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder) / "state", state)
        loaded = checkpoint.load(Path(folder) / "state", like=subject.state)
    check_equal(loaded, state, "the state that was loaded: ")
    for number in range(2):
        state, metrics = subject.step(state, subject.batch)
        loaded, found = subject.step(loaded, subject.batch)
        check_equal((loaded, found), (state, metrics), f"{number + 1} steps later: ")


def traced_step(subject: StepSubject) -> None:
    """A step is traced once for all steps, reads nothing back to the host, and what was seen makes the same bits."""
    program = compilation.interpret(assert_max_traces(1)(lambda state, batch: subject.step(state, batch)))
    state = subject.state
    for number in range(3):
        want = subject.step(state, subject.batch)
        check_equal(program(state, subject.batch), want, f"traced, step {number}: ")
        state = want[0]


def donated_step(subject: StepSubject) -> None:
    """A compiled step that is given its state's memory is the step, to rounding, and consumes the state."""
    program = transforms.compile(subject.step, donate=True)
    given, want = cloned(subject.state), subject.state
    for number in range(2):
        old = tree.leaves(given)
        given, metrics = program(given, subject.batch)
        want, found = subject.step(want, subject.batch)
        check_close((given, metrics), (want, found), subject.rtol, f"compiled, step {number}: ")
        for path, leaf in zip(tree.paths(want), old, strict=True):
            if not _consumed(leaf):
                raise Broken(path, "was given away and can still be read")


def split_step(subject: StepSubject) -> None:
    """Slices of a batch, one after another, make the step of the whole batch, to rounding (declared)."""
    assert subject.split is not None
    whole, metrics = subject.step(subject.state, subject.batch)
    rows = len(tree.leaves(subject.batch)[0])
    for parts in sorted({min(n, rows) for n in (1, 2, 3)}):
        new, found = subject.split(parts)(subject.state, subject.batch)
        check_close((new, found), (whole, metrics), subject.rtol, f"in {parts} slices: ")


def _consumed(leaf: Tensor) -> bool:
    try:
        leaf.sum()
    except transforms.ConsumedError:
        return True
    return False


LAWS = [
    Law(pure_step, "keep everything that changes in the state, and draw from its key with ft.random"),
    Law(kept_step, "return every leaf of the state, in its own dtype"),
    Law(resumed_step, "keep everything that a later step needs in leaves of the state"),
    Law(traced_step, "read no tensor back to the host, and keep numbers that change in tensors"),
    Law(donated_step, "give every leaf of the state a memory of its own"),
]
SPLIT = Law(split_step, "return a Loss: sums, with the weight of what was summed; a mean of each slice is not enough")
