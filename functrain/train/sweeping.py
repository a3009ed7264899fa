"""Many whole runs as one: the step mapped over states that differ in hyper-parameters, seeds, or anything else.

K lanes, one for each run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from functrain import random, tree
from functrain.train.beginning import lane_of
from functrain.train.loop import Metrics, Step
from functrain.train.state import TrainState
from functrain.transforms import vmap
from functrain.tree import Batch

Over: TypeAlias = Mapping[str, Sequence[Any]]


def sweep(step: Step, over: Over, *, batches: bool = False) -> Sweep:
    """Make K runs one step `(states, batch) -> (states, metrics)`; lane i is the run with the i-th value of each list.

    A name is that of a number which `ft.optim.inject_hyperparams` keeps in the state, such as "learning_rate"; or
    "seed", which gives the lane its key; or "init", whole beginnings: states, or functions from a key to one; or a path
    into the state, such as "params" or "opt_state/1/hyperparams/b1". `grid` makes all combinations. Lists of seeds
    alone make an ensemble. The lanes share each batch; with `batches` its leaves are (K, ...), and each lane has its
    own. What an optimizer makes of its numbers or of the params before the first step, as Rprop's step sizes, is made
    for each lane, where `step` is one of `ft.train_step` or `ft.train.private_step`.

    Equals the K runs one after another, to floating-point rounding, with the same random numbers. Goes inside
    `ft.compile`, where all lanes are one graph.

    Raises: ValueError for lists of different lengths or none; at the call, naming a leaf that is not (K, ...).

    >>> optimizer = ft.optim.inject_hyperparams(ft.optim.sgd)(learning_rate=0.1)
    >>> step = ft.train_step(lambda params, x, key: (params["w"] - x) ** 2, optimizer)
    >>> swept = ft.sweep(step, {"learning_rate": [0.25, 0.5]})
    >>> states = swept.init(ft.init_state({"w": torch.tensor(0.0)}, optimizer, key=ft.random.key(0)))
    >>> states, metrics = swept(states, torch.tensor(1.0))
    >>> states.params["w"]
    tensor([0.5000, 1.0000])
    """
    return Sweep(step, over, batches=batches)


def grid(over: Over) -> dict[str, list[Any]]:
    """Return the lists of all combinations of the values in `over`, the last name's values changing fastest.

    >>> grid({"learning_rate": [0.1, 0.2], "seed": [0, 1]})
    {'learning_rate': [0.1, 0.1, 0.2, 0.2], 'seed': [0, 1, 0, 1]}
    """
    rows = list(itertools.product(*over.values()))
    return {name: [row[i] for row in rows] for i, name in enumerate(over)}


class Sweep:
    """K runs as one step; made by `sweep`."""

    def __init__(self, step: Step, over: Over, *, batches: bool = False) -> None:
        if not isinstance(over, Mapping):
            raise TypeError(f"sweep: expected a dict from names to lists, came {type(over).__name__}")
        plan = getattr(step, "plan", None)
        if plan is not None and plan.ranks > 1:
            raise ValueError(
                f"sweep: expected a step of one process, came one with a plan of {plan.ranks} ranks; give each rank "
                "lanes of its own, in a step without plan="
            )
        for name, values in over.items():
            if not hasattr(values, "__len__"):
                raise TypeError(f"sweep: {name}: expected a list, a value for each lane, came {values!r}")
        sizes = {name: len(values) for name, values in over.items()}
        if not sizes or len(set(sizes.values())) > 1 or 0 in sizes.values():
            raise ValueError(
                f"sweep: expected lists of one length, a value for each lane, came {sizes}; ft.train.grid(over) makes "
                "all combinations"
            )
        self.step, self.batches = step, batches
        self.over = {name: list(values) for name, values in over.items()}
        self.lanes = next(iter(sizes.values()))

    def init(self, state: TrainState | Callable[[Tensor], TrainState] | None = None) -> TrainState:
        """Return the states of all lanes, every leaf (K, ...), from one state or a function from a lane's key to it.

        None where "init" is swept.

        Raises: ValueError for a name that the state does not have, or that several of its hyper-parameters have; for a
        value of another shape, or beginnings of several; for a function where "seed" is not swept; for a state that
        went on from what a swept number has made. TypeError for a beginning that is no state.
        """
        if (state is None) != ("init" in self.over):
            here, there = ("none", "none") if state is None else ("a state", 'one for each lane, as "init"')
            raise ValueError(f"sweep: expected a state, or beginnings as over['init'], came {here} and {there}")
        if any(map(callable, self.over.get("init", [state]))) and "seed" not in self.over:
            raise ValueError('sweep: expected "seed" in over, which gives init its keys, came none; pass a state')
        lanes = [self._lane(state, i) for i in range(self.lanes)]
        first = tree.items(lanes[0])
        for i, lane in enumerate(lanes):
            tree.check_same_structure(lanes[0], lane, what=f"sweep: the states of lane 0 and lane {i}")
            for (path, a), b in zip(first, tree.leaves(lane), strict=True):
                if a.shape != b.shape or a.dtype != b.dtype:  # torch.stack would make one dtype of two
                    raise ValueError(
                        f"sweep: {path}: expected {a.dtype} {tuple(a.shape)} in all lanes, as in lane 0, came "
                        f"{b.dtype} {tuple(b.shape)} in lane {i}; lanes are one tensor, so sweep each size by itself"
                    )
        return tree.map(lambda *leaves: torch.stack(leaves), *lanes)

    def __call__(self, states: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        self._check_lanes("states", states)
        if self.batches:
            self._check_lanes("batch", batch)
        (leaves, structure), (rows, batch_structure) = tree.flatten(states), tree.flatten(batch)
        found: list[Any] = []

        # flat lists of tensors in and out, because torch.func walks trees by torch's own registry, not by ours
        def one(leaves: list[Tensor], rows: list[Tensor]) -> list[Tensor]:
            result = self.step(tree.unflatten(structure, leaves), tree.unflatten(batch_structure, rows))
            for path, leaf in tree.items(result):
                if not isinstance(leaf, Tensor):
                    raise TypeError(
                        f"sweep: the result of the step: {path}: expected a tensor, which is mapped over, came "
                        f"{type(leaf).__name__} {leaf!r}; leave it out, or make it a tensor"
                    )
            flat, treedef = tree.flatten(result)
            found.append(treedef)
            return flat

        results = vmap(one, (0, 0 if self.batches else None))(leaves, rows)
        return tree.unflatten(found[0], results)

    def lane(self, states: Any, index: int) -> Any:
        """Return lane number `index` of a tree whose leaves are (K, ...): copies, as its solo run would have them."""
        return tree.map(lambda leaf: leaf[index].clone(), states)

    def values(self, index: int) -> dict[str, Any]:
        """Return what lane number `index` was given."""
        return {name: values[index] for name, values in self.over.items()}

    def best(self, losses: Tensor) -> int:
        """Return the number of the lane with the smallest of `losses` (K,); NaN is larger than all. Reads to the host.

        Raises: ValueError where all are NaN.
        """
        if losses.shape != (self.lanes,):
            raise ValueError(f"best: expected a number for each lane, ({self.lanes},), came {tuple(losses.shape)}")
        if bool(torch.isnan(losses).all()):
            raise ValueError("best: expected a lane that is not NaN, came none; sweep smaller learning rates")
        return int(torch.sort(losses, stable=True).indices[0])  # which puts NaN last

    def _check_lanes(self, what: str, values: Any) -> None:
        for path, leaf in tree.items(values):
            if not isinstance(leaf, Tensor) or leaf.shape[:1] != (self.lanes,):
                came = tuple(leaf.shape) if isinstance(leaf, Tensor) else repr(leaf)
                way = "sweep.init(state) makes them" if what == "states" else "stack a batch for each lane"
                raise ValueError(f"sweep: {what}: {path}: expected ({self.lanes}, ...), came {came}; {way}")

    def _lane(self, state: TrainState | Callable[[Tensor], TrainState] | None, index: int) -> TrainState:
        given = self.values(index)
        begin = given.pop("init", state)
        if "seed" in given:
            seed = given.pop("seed")
            if callable(begin):
                begin = begin(random.key(seed))
            elif isinstance(begin, TrainState):
                if begin.key.shape != (2,):
                    raise ValueError(
                        f"sweep: seed: expected a state with one key (2,), came {tuple(begin.key.shape)}, the keys of "
                        "the lanes of another sweep; sweep seeds there, or beginnings as over['init']"
                    )
                begin = begin._replace(key=random.key(seed, begin.key.device))
        if not isinstance(begin, TrainState):
            raise TypeError(f"sweep: expected a state of init_state, or a function to one, came {type(begin).__name__}")
        return lane_of(begin, given, getattr(self.step, "optimizer", None))
