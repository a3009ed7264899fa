"""The first state of a lane of a sweep: what it would have been, had the run begun with the lane's own numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from functrain import tree
from functrain.compiler import engine
from functrain.optim import GradientTransformation
from functrain.optim.injection import replaced
from functrain.train.state import TrainState
from functrain.tree.hints import listed


def lane_of(state: TrainState, given: Mapping[str, Any], optimizer: GradientTransformation | None) -> TrainState:
    """Return the state with the values `given` by name or path; see `ft.sweep`."""
    lane = state
    paths = {_path(state, name): value for name, value in given.items()}
    for path, value in paths.items():
        lane = _put(lane, path, value)
    return lane if optimizer is None else _begun(optimizer, state, lane, list(paths))


def _begun(optimizer: GradientTransformation, state: TrainState, lane: TrainState, paths: list[str]) -> TrainState:
    """Return the lane with whatever the optimizer makes of its numbers and params at the beginning made of its own."""
    numbers = {path.rpartition("/hyperparams/") for path in paths if "/hyperparams/" in path}
    if not numbers and not any(path.partition("/")[0] == "params" for path in paths):
        return lane
    base, plain = optimizer.init(state.params), optimizer.init(lane.params)
    tree.check_same_structure(base, state.opt_state, what="sweep: opt_state, and that of the step's optimizer")
    with replaced({name: tree.at(lane, f"{place}/hyperparams/{name}") for place, _, name in numbers}):
        own = optimizer.init(lane.params)
    inside = tuple(f"{place}/" for place, _, _ in numbers)  # another one's number of the same name stays what it is
    unread = engine.here.tracing or engine.nested()  # a number cannot be read to the host, and an error not be raised
    leaves = []
    for (path, old), other, new, came, kept in zip(
        tree.items({"opt_state": base}),
        *map(tree.leaves, (plain, own, state.opt_state, lane.opt_state)),
        strict=True,
    ):
        wanted = new if path.startswith(inside) else other
        if "/hyperparams/" in path or kept is not came:
            leaves.append(kept)
        elif unread:
            leaves.append(torch.where(_equal(came, old) & (state.step == 0), wanted, kept))
        elif _same(wanted, old):
            leaves.append(kept)
        elif _same(came, old) and int(state.step) == 0:
            leaves.append(wanted)
        else:
            raise ValueError(
                f"sweep: {path}: the optimizer makes it of {', '.join(paths)} at the beginning, and the state has gone "
                "on from there; sweep from the state that init_state returns"
            )
    return lane._replace(opt_state=tree.unflatten(tree.structure(lane.opt_state), leaves))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(_equal(a, b))


def _equal(a: Tensor, b: Tensor) -> Tensor:
    return torch.all((a == b) | ((a != a) & (b != b)))


def _path(state: TrainState, name: str) -> str:
    paths = [path for path, _ in tree.items(state) if path.endswith(f"/hyperparams/{name}")]
    if len(paths) > 1:
        raise ValueError(f"sweep: {name!r} is the name of several hyper-parameters; name one by its path: {paths}")
    path = paths[0] if paths else name
    place, found, field = path.rpartition("/hyperparams/")
    if found and any(p.startswith(f"{place}/hyperparams_states/{field}/") for p, _ in tree.items(state)):
        raise ValueError(f"sweep: {path}: expected a number, came a schedule, which gives it anew in every step")
    try:
        tree.at(state, path)
    except tree.PathError as error:
        known = [p.rpartition("/")[2] for p, _ in tree.items(state) if "/hyperparams/" in p]
        came = listed([name], [*known, "seed", "init", *tree.paths(state)])
        raise ValueError(
            f"sweep: expected a hyper-parameter in the state, of which there is {known}, a path, 'seed' or 'init', "
            f"came {came}; make the optimizer by ft.optim.inject_hyperparams(factory)({name}=...)"
        ) from error
    return path


def _put(state: TrainState, path: str, value: Any) -> TrainState:
    old = tree.at(state, path)
    new = _number(path, old, value) if isinstance(old, Tensor) else value
    tree.check_same_structure(old, new, what=f"sweep: {path}")
    for (below, a), b in zip(tree.items(old), tree.leaves(new), strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            where, came = "/".join(p for p in (path, below) if p), f"{b.dtype} {tuple(b.shape)}"
            raise ValueError(f"sweep: {where}: expected {a.dtype} {tuple(a.shape)}, as in the state, came {came}")
    return tree.set_at(state, path, new)


def _number(path: str, old: Tensor, value: Any) -> Tensor:
    try:
        given = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        came = f"{type(value).__name__} {value!r}"
        raise TypeError(f"sweep: {path}: expected numbers, one for each lane, came {came}") from None
    if not torch.can_cast(given.dtype, old.dtype):  # a learning rate of 0.1 would be the integer 0
        raise TypeError(
            f"sweep: {path}: expected a number that fits {old.dtype}, as the state has it, came {value!r}; where the "
            "optimizer was given 0 or 1, give it 0.0 or 1.0"
        )
    return torch.as_tensor(value, dtype=old.dtype, device=old.device)
