"""Laws of a pure function: the same bits for the same arguments, and nothing else happens."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from functrain import tree
from functrain.testing.law import STEPS, Broken, Law, Subject, Trial, check_equal, check_like, cloned
from functrain.tree import Tree


def pure(subject: Subject, trial: Trial) -> None:
    """Calling `init` or `update` twice gives the same bits, and leaves the arguments as they were."""
    tx = subject.build()
    params = cloned(trial.params)
    state = tx.init(params)
    check_equal(params, trial.params, "params after init: ")
    check_equal(tx.init(params), state, "init called again: ")
    grads = subject.gradients(trial.params, trial.seed)
    _, state = subject.update(tx, grads, state, params)  # a state that is not only zeros
    before = cloned((grads, state, params))
    grads, state, params = cloned(before)
    first = subject.update(tx, grads, state, params, 1)
    made = cloned(first)
    for came, want, what in zip((grads, state, params), before, ("updates", "state", "params"), strict=True):
        check_equal(came, want, f"the argument {what} after update: ")
    second = subject.update(tx, grads, state, params, 1)
    check_equal(second[0], made[0], "updates of a second call: ")
    check_equal(second[1], made[1], "the state of a second call: ")
    subject.update(tx, subject.gradients(trial.params, trial.seed + 1), state, params, 2)
    check_equal(first, made, "what the first call returned, after another one: ")


def kept(subject: Subject, trial: Trial) -> None:
    """Updates keep the structure, shapes and dtypes of params; the state keeps its own from step to step."""
    tx = subject.build()
    state = tx.init(trial.params)
    first = state
    for step in range(2):
        grads = subject.gradients(trial.params, trial.seed + step)
        updates, state = subject.update(tx, grads, state, trial.params, step)
        check_like(updates, trial.params, "updates: ")
        check_like(state, first, f"the state after {step + 1} updates: ")


def deterministic(subject: Subject, trial: Trial) -> None:
    """A trajectory is a function of params and gradients: made again it has the same bits, and torch's global random
    numbers are neither used nor drawn."""
    grads = subject.grads(trial)
    before = torch.get_rng_state()
    run = subject.run(subject.build(), trial.params, grads)
    drawn = not torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trial.seed + 1)
        again = subject.run(subject.build(), trial.params, grads)
    check_equal(again, run, "the second time: ")
    if drawn:
        raise Broken("", "torch's global random numbers were drawn")


def owned(subject: Subject, trial: Trial) -> None:
    """No leaf of a state stands on the memory of params, or of another leaf of the first state."""
    tx = subject.build()
    state = tx.init(trial.params)
    seen: dict[int, str] = {}
    for path, leaf in tree.items(state):
        place = _place(leaf)
        if place in seen:
            raise Broken(path, f"shares its memory with {seen[place]}")
        if place:
            seen[place] = path
    _, new = subject.update(tx, subject.gradients(trial.params, trial.seed), state, trial.params)
    owners = {_place(leaf): path for path, leaf in tree.items(trial.params) if _place(leaf)}
    for what, made in (("the first state: ", state), ("the state after an update: ", new)):
        for path, leaf in tree.items(made):
            if _place(leaf) in owners:
                owner = owners[_place(leaf)] or "itself"
                raise Broken(path, f"{what}shares its memory with params: {owner}")


def unordered(subject: Subject, trial: Trial) -> None:
    """The order in which a dictionary was filled changes nothing: paths tell leaves apart."""
    grads = subject.grads(trial)
    plain = subject.run(subject.build(), trial.params, grads)
    other = subject.run(subject.build(), _reversed(trial.params), [_reversed(g) for g in grads])
    check_equal(other, plain, "with dictionaries filled the other way round: ")


def _place(leaf: Any) -> int:
    return leaf.data_ptr() if isinstance(leaf, Tensor) and leaf.numel() else 0


def _reversed(node: Tree) -> Tree:
    if isinstance(node, dict) and not isinstance(node, OrderedDict):
        return {key: _reversed(node[key]) for key in reversed(node)}
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return type(node)(*map(_reversed, node))
    return type(node)(map(_reversed, node)) if type(node) in (list, tuple) else node


LAWS = [
    Law(pure, "keep what changes between steps in the state, and write to no argument"),
    Law(kept, "return a leaf for each leaf that came, and cast it to the dtype that it had"),
    Law(deterministic, f"draw from a key in the state with ft.random, and keep nothing else over {STEPS} steps"),
    Law(owned, "clone what the state keeps of params, so that each can be given away"),
    Law(unordered, "walk trees with ft.tree, which goes by sorted paths"),
]
