"""The parameters that a state is evaluated by: those that its optimizer averages."""

from __future__ import annotations

from typing import Any

import torch

from functrain import tree
from functrain.optim import ScheduleFreeState, schedule_free_eval_params
from functrain.optim.params_averages import ParamsEmaState, ParamsMeanState
from functrain.train.state import TrainState
from functrain.tree import Params, Tree
from functrain.tree.hints import listed


def averaged(state: TrainState) -> Params:
    """Return the averaged params of a state, to be evaluated or generated from, in the dtype of the params.

    The average is that of `ft.optim.keep_ema` or `ft.optim.keep_swa`, or x of `ft.optim.schedule_free`, wherever it is
    in the optimizer. A leaf that is not averaged, because it is frozen or masked out, is the param itself. The state of
    a sweep gives the params of all lanes.

    Raises: ValueError for a state without an average, or with several; TypeError for what is no TrainState.

    >>> optimizer = ft.optim.keep_ema(ft.optim.sgd(0.25), decay=0.5, debias=False)
    >>> step = ft.train_step(lambda params, x, key: (params["w"] - x) ** 2, optimizer)
    >>> state = ft.init_state({"w": torch.tensor(0.0)}, optimizer, key=ft.random.key(0))
    >>> state, metrics = step(state, torch.tensor(1.0))
    >>> state.params["w"], ft.train.averaged(state)["w"]
    (tensor(0.5000), tensor(0.2500))
    """
    if not isinstance(state, TrainState):
        raise TypeError(f"averaged: expected a state of init_state, came {type(state).__name__}")
    if state.step.dim() > 0:  # an average may need the numbers of its own lane
        lanes = [averaged(tree.map(lambda leaf, i=i: leaf[i], state)) for i in range(len(state.step))]
        return tree.map(lambda *leaves: torch.stack(leaves), *lanes)
    found = _averages(state.opt_state, "opt_state")
    if len(found) != 1:
        came = listed([path for path, _ in found]) if found else "none"
        way_out = "keep one of them" if found else "make the optimizer by ft.optim.keep_ema(optimizer, decay=0.999)"
        raise ValueError(
            f"averaged: expected one average of params in the state of the optimizer, came {came}; {way_out}"
        )
    average = found[0][1]
    values: dict[str, Any]
    if isinstance(average, ScheduleFreeState):
        params = _like(state.params, average.z)
        values = dict(tree.items(schedule_free_eval_params(average, params)))
    else:
        values = dict(tree.items(average.average))
    return tree.map_with_path(lambda path, leaf: values[path].to(leaf.dtype) if path in values else leaf, state.params)


def _averages(node: Tree, path: str) -> list[tuple[str, Any]]:
    found = [(path, node)] if isinstance(node, (ParamsEmaState, ParamsMeanState, ScheduleFreeState)) else []
    for name, child in tree.children(node) or ():
        found += _averages(child, f"{path}/{name}")
    return found


def _like(params: Params, part: Params) -> Params:
    """Return the leaves of params at the paths of `part`, in its containers."""
    values = dict(tree.items(params))
    return tree.map_with_path(lambda path, _: values[path], part)
