"""States of torch's optimizers as ours and back, parameter by parameter: training goes on from the other side.

What torch calls `exp_avg` is `mu` here; a table below says so for every state that both have. Hyper-parameters are not
state: write them down again where the optimizer is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.transformation import OptState
from functrain.tree.hints import instead, listed
from functrain.tree.nodes import rebuild

# fields of our states, by the name that torch gives them; of two names, the first that torch has
_MOMENTS = {"mu": ("exp_avg",), "nu": ("exp_avg_sq", "exp_inf")}
_FIELDS: dict[str, dict[str, tuple[str, ...]]] = {
    "ScaleByAdamState": _MOMENTS,
    "TraceState": {"trace": ("momentum_buffer",)},
    "ScaleByRmsState": {"nu": ("square_avg",)},
    "ScaleByRStdDevState": {"mu": ("grad_avg",), "nu": ("square_avg",)},
    "ScaleByRssState": {"sum_of_squares": ("sum",)},
    "ScaleByAdaDeltaState": {"e_g": ("square_avg",), "e_x": ("acc_delta",)},
    "ScaleByRpropState": {"step_sizes": ("step_size",), "prev_updates": ("prev",)},
    "ScaleByScheduleState": {},
}
# what each of torch's optimizers keeps, besides a buffer of momentum
_KEYS = {
    "Adam": ("step", "exp_avg", "exp_avg_sq"),
    "AdamW": ("step", "exp_avg", "exp_avg_sq"),
    "RAdam": ("step", "exp_avg", "exp_avg_sq"),
    "Adamax": ("step", "exp_avg", "exp_inf"),
    "SGD": (),
    "RMSprop": ("step", "square_avg"),
    "Adagrad": ("step", "sum"),
    "Adadelta": ("step", "square_avg", "acc_delta"),
    "Rprop": ("step", "prev", "step_size"),
}


def from_torch_state(
    opt_state: OptState, torch_state: Mapping[str, Any], names: Sequence[str] | None = None, *, step: int | None = None
) -> OptState:
    """Return `opt_state` with the moments and counts of `torch_optimizer.state_dict()`.

    Training goes on as it would have in torch, to float rounding, when the optimizer has the same hyper-parameters:
    `adamw`, `adam`, `sgd`, `rmsprop` with `eps_in_sqrt=False`, `adagrad` with eps 0, `adadelta`, `adamax`, `radam` and
    `rprop`, alone or under clipping, masks and `partition`, whatever the order of groups.

    `opt_state` is `optimizer.init(params)`. `names` are the paths of torch's parameters, in its order over all groups;
    None takes the names that the torch optimizer was given (`named_parameters()`), with "/" for ".". `step` is the
    number of steps where torch does not keep it, as SGD's.

    Raises: ValueError that names a parameter, field or state that only one of the two has; TypeError for another dtype.

    >>> params = {"w": torch.nn.Parameter(torch.tensor([1.0, -2.0]))}
    >>> theirs = torch.optim.AdamW(params.items(), lr=0.1)
    >>> params["w"].grad = torch.tensor([3.0, -0.5])
    >>> theirs.step()
    >>> state = ft.optim.adamw(0.1).init({"w": params["w"].detach()})
    >>> ft.tree.get(ft.optim.from_torch_state(state, theirs.state_dict()), "mu")
    {'w': tensor([ 0.3000, -0.0500])}
    """
    by_path = _by_path(torch_state, names)
    factors = _rates(torch_state, names)
    used: set[tuple[str, str]] = set()
    new = _convert(opt_state, by_path, factors, step, used)
    _check_all_used(by_path, used)
    return new


def to_torch_state(
    opt_state: OptState, torch_optimizer: Any, names: Sequence[str] | None = None, *, step: int | None = None
) -> dict[str, Any]:
    """Return what `torch_optimizer.load_state_dict` takes to go on from `opt_state`.

    The inverse of `from_torch_state`. `torch_optimizer` is a new one, over the parameters that go on; its groups keep
    their hyper-parameters. `step` is the number of steps where our state does not keep it, as that of `rmsprop`.

    Raises: ValueError that names what one of the two lacks.

    >>> params, optimizer = {"w": torch.tensor([1.0, -2.0])}, ft.optim.adamw(0.1)
    >>> _, state = optimizer.update({"w": torch.tensor([3.0, -0.5])}, optimizer.init(params), params)
    >>> theirs = torch.optim.AdamW([("w", torch.nn.Parameter(params["w"]))], lr=0.1)
    >>> ft.optim.to_torch_state(state, theirs)["state"][0]["exp_avg"]
    tensor([ 0.3000, -0.0500])
    """
    kind = type(torch_optimizer).__name__
    if kind not in _KEYS:
        raise ValueError(
            f"to_torch_state: expected one of {', '.join(_KEYS)}, came {kind}, which no state here is like"
        )
    result = torch_optimizer.state_dict()
    paths = _paths(result, names)
    counts: dict[str | None, Tensor] = {}
    moments = _moments(opt_state, counts)
    strangers = sorted(set(moments) - set(paths.values()))
    if strangers:
        raise ValueError(
            f"to_torch_state: torch's optimizer has no parameter {listed(strangers, list(paths.values()))}"
        )
    state: dict[int, dict[str, Tensor]] = {}
    for group in result["param_groups"]:
        for index in group["params"]:
            path = paths[index]
            ours = list(moments.get(path, []))
            state[index] = {}
            for key in _keys(kind, group):
                if key == "step":
                    state[index][key] = _step(kind, counts.get(path, counts.get(None)), step)
                    continue
                found = next((pair for pair in ours if key in pair[0]), None)
                if found is None:
                    raise ValueError(f"to_torch_state: {path}: {kind} keeps {key}, which our state has not")
                ours.remove(found)
                value = found[1].detach().clone()
                # RMSprop's momentum is multiplied by the learning rate here, and not there
                state[index][key] = -value / group["lr"] if (kind, key) == ("RMSprop", "momentum_buffer") else value
            if ours:
                raise ValueError(
                    f"to_torch_state: {path}: {kind} with these hyper-parameters keeps no {' or '.join(ours[0][0])}; "
                    "make it with the momentum, or of the class, that the state is of"
                )
    return result | {"state": {index: values for index, values in state.items() if values}}


def _rates(torch_state: Mapping[str, Any], names: Sequence[str] | None) -> dict[str, Any]:
    paths = _paths(torch_state, names)
    return {paths[index]: group["lr"] for group in torch_state["param_groups"] for index in group["params"]}


def _paths(torch_state: Mapping[str, Any], names: Sequence[str] | None) -> dict[int, str]:
    """Return the path of each of torch's parameters, by its index."""
    groups = torch_state["param_groups"]
    indices = [index for group in groups for index in group["params"]]
    if names is None:
        if any("param_names" not in group for group in groups):
            raise ValueError(
                "torch state: expected names of the parameters, came none; pass names=, or make torch's optimizer of "
                "module.named_parameters()"
            )
        names = [name.replace(".", "/") for group in groups for name in group["param_names"]]
    if len(names) != len(indices) or len(set(names)) != len(names):
        raise ValueError(
            f"torch state: expected {len(indices)} different names, one for each parameter of torch's optimizer in its "
            f"order, came {len(names)}, {len(set(names))} of them different"
        )
    return dict(zip(indices, names, strict=True))


def _by_path(torch_state: Mapping[str, Any], names: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    paths, state = _paths(torch_state, names), torch_state["state"]
    return {path: {k: v for k, v in state.get(i, {}).items() if v is not None} for i, path in paths.items()}


def _convert(
    node: Any, by_path: dict[str, dict[str, Any]], rates: dict[str, Any], step: int | None, used: set[tuple[str, str]]
) -> Any:
    if not _known(node):
        made = [_convert(child, by_path, rates, step, used) for _, child in _children("from_torch_state", node)]
        return rebuild(node, made)
    fields: dict[str, Any] = {}
    inside: set[str] = set()
    for field, keys in _fields_of(node).items():
        place = f"{type(node).__name__}.{field}"

        def of(path: str, ours: Tensor, keys: tuple[str, ...] = keys, place: str = place) -> Tensor:
            key, value = _found(by_path, path, keys, place)
            used.add((path, key))
            inside.add(path)
            # RMSprop's momentum is multiplied by the learning rate here, and not there
            rescaled = key == "momentum_buffer" and "square_avg" in by_path[path]
            return _fitting(path, key, -rates[path] * value if rescaled else value, ours)

        fields[field] = tree.map_with_path(of, getattr(node, field))
    if "count" in node._fields:
        fields["count"] = _count(node.count, {path: by_path[path] for path in inside or by_path}, step)
    return node._replace(**fields)


def _found(by_path: dict[str, dict[str, Any]], path: str, keys: tuple[str, ...], place: str) -> tuple[str, Tensor]:
    if path not in by_path:
        raise ValueError(
            f"from_torch_state: torch's optimizer has no parameter {path!r}; it has {instead(path, sorted(by_path))}"
        )
    theirs = by_path[path]
    key = next((key for key in keys if key in theirs), None)
    if key is None:
        came = _some(theirs) if theirs else "nothing, torch has not stepped it"
        raise ValueError(
            f"from_torch_state: {path}: expected {' or '.join(keys)} for {place}, came {came}; make the optimizer that "
            "torch's is"
        )
    return key, theirs[key]


def _count(ours: Tensor, theirs: dict[str, dict[str, Any]], step: int | None) -> Tensor:
    steps = {path: int(values["step"]) for path, values in theirs.items() if "step" in values}
    different = sorted(set(steps.values()))
    if len(different) > 1:
        raise ValueError(
            f"from_torch_state: expected one number of steps, came {different}: torch counts those of each parameter; "
            "give parameters that skip steps a transformation of their own with ft.optim.partition"
        )
    done = different[0] if different else step
    if done is None:
        raise ValueError("from_torch_state: torch's state has no step, and ours counts them; pass step=")
    return torch.full_like(ours, done)


def _fitting(path: str, key: str, theirs: Tensor, ours: Tensor) -> Tensor:
    if theirs.shape != ours.shape:
        raise ValueError(f"from_torch_state: {path}: {key}: expected {tuple(ours.shape)}, came {tuple(theirs.shape)}")
    if theirs.dtype != ours.dtype:
        raise TypeError(
            f"from_torch_state: {path}: {key}: expected {ours.dtype}, came {theirs.dtype}; cast the parameters first, "
            "or set the dtype of the moments"
        )
    return theirs.detach().to(ours.device, copy=True)


def _check_all_used(by_path: dict[str, dict[str, Any]], used: set[tuple[str, str]]) -> None:
    for path, values in by_path.items():
        left = sorted(key for key in values if key != "step" and (path, key) not in used)
        if left:
            raise ValueError(
                f"from_torch_state: {path}: nothing here takes torch's {listed(left)}; make the optimizer that torch's "
                "is (with its momentum, say), and drop parameters that are not trained here"
            )


def _moments(node: Any, counts: dict[str | None, Tensor]) -> dict[str, list[tuple[tuple[str, ...], Tensor]]]:
    """Return (torch's keys, value) of every moment, by path, and put the counts beside them in `counts`; a count beside
    no moment counts for all, under None."""
    found: dict[str, list[tuple[tuple[str, ...], Tensor]]] = {}
    if not _known(node):
        for _, child in _children("to_torch_state", node):
            for path, more in _moments(child, counts).items():
                found.setdefault(path, []).extend(more)
        return found
    for field, keys in _fields_of(node).items():
        for path, leaf in tree.items(getattr(node, field)):
            found.setdefault(path, []).append((keys, leaf))
    if "count" in node._fields:
        counts |= {path: node.count for path in found or [None]}
    return found


def _keys(kind: str, group: Mapping[str, Any]) -> tuple[str, ...]:
    for option in ("amsgrad", "dampening"):
        if group.get(option):
            raise ValueError(f"to_torch_state: {kind} with {option}={group[option]} is no optimizer here; leave it out")
    more = ("grad_avg",) if group.get("centered") else ()
    return _KEYS[kind] + more + (("momentum_buffer",) if group.get("momentum") else ())


def _step(kind: str, count: Tensor | None, step: int | None) -> Tensor:
    done = step if count is None else count
    if done is None:
        raise ValueError(f"to_torch_state: {kind} counts its steps, and our state does not; pass step=")
    return torch.tensor(float(done))


def _known(node: Any) -> bool:
    return hasattr(node, "_fields") and _name(node) in _FIELDS


def _fields_of(node: Any) -> dict[str, tuple[str, ...]]:
    return _FIELDS[_name(node)]


def _name(node: Any) -> str:
    return type(node).__name__.replace("WithCountState", "State")


def _children(caller: str, node: Any) -> list[tuple[str, Any]]:
    pairs = tree.children(node)
    if pairs is None:
        came = "a tensor" if isinstance(node, Tensor) else f"a {type(node).__name__}"
        raise ValueError(
            f"{caller}: expected states that torch has too, {', '.join(_FIELDS)}; came {came} outside of them"
        )
    return pairs


def _some(names: Any) -> str:
    return listed(sorted(names))
