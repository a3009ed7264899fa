"""Operations on leaves of one kind: recorded for the first, and copied for the others.

To run an operation in Python on tensors without data takes several times as long as to copy its node.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from functrain import tree
from functrain.compiler.arguments import same_value
from functrain.compiler.graph_passes import is_view
from functrain.compiler.recording import Recording

Function = Callable[..., Any]


class _Step(NamedTuple):
    """One node that depends on the leaves."""

    node: fx.Node  # as it was recorded; by now it is erased
    args: Any
    kwargs: Any
    meta: dict[str, Any]


class _Recipe(NamedTuple):
    """What a function does to leaves of one kind."""

    leaves: list[Any]  # what stands for them: nodes, or None for what is no tensor
    steps: list[_Step]
    structure: Any
    results: list[Any]  # nodes of the steps and leaves, or values that are the same for all


def recorder(mode: Recording) -> Callable[[Function], Function]:
    """Return what `tree.by_kind` asks while a trace records."""

    def once_a_kind(fn: Function) -> Function:
        recipes: dict[Any, _Recipe | None] = {}

        def run(*row: Any) -> Any:
            kind = _kind(mode, row) if _records_plainly(mode) else None
            if kind is None:
                return fn(*row)
            if kind not in recipes:
                recipes[kind] = _recipe(mode, fn, row)
            recipe = recipes[kind]
            return fn(*row) if recipe is None else _again(mode, recipe, row)

        return run

    return once_a_kind


def _records_plainly(mode: Recording) -> bool:
    """Tell whether an operation on tensors of the trace comes to it as it is, past no transform."""
    if not mode.recording or mode.functional is not None:
        return False
    modes = _get_current_dispatch_mode_stack()
    return modes == [mode] and torch._C._functorch.peek_interpreter_stack() is None


def _kind(mode: Recording, row: Sequence[Any]) -> Any:
    """Return what a function may know of its leaves: how they lie, and which of them are one."""
    kind: list[Any] = [torch.get_default_dtype()]
    places: dict[fx.Node, int] = {}
    for i, x in enumerate(row):
        if not isinstance(x, Tensor):
            kind.append(same_value(x))
        elif isinstance(x, FakeTensor) and x.fake_mode is mode and x.constant is None and not x.requires_grad:
            first = places.setdefault(mode.node_of(x), i)
            kind.append((x.shape, x.stride(), x.dtype, x.device, first))
        else:
            return None
    made = tuple(kind)
    try:
        hash(made)
    except TypeError:
        return None
    return made


def _recipe(mode: Recording, fn: Function, row: Sequence[Any]) -> _Recipe | None:
    """Record what a function does to tensors that stand for its leaves, and take it out of the graph again.

    None where that is not the whole of it: what is differentiated, or an operation that is no plain one.
    """
    leaves: list[Any] = [mode.node_of(x) if isinstance(x, Tensor) else None for x in row]
    once = {node: x for node, x in zip(leaves, row, strict=True) if node is not None}
    stands = {node: mode.stand_in(x) for node, x in once.items()}
    if not stands:
        return None
    given = [x if node is None else stands[node][0] for node, x in zip(leaves, row, strict=True)]
    first = next(iter(stands.values()))[1]
    asked = len(mode.tangents), len(mode.budgets)
    recorded: list[fx.Node] = []
    depends: set[fx.Node] = {node for _, node in stands.values()}
    whole = False
    try:
        results, structure = tree.flatten(fn(*given))
        recorded = _behind(first, depends)
        whole = asked == (len(mode.tangents), len(mode.budgets)) and all(map(_is_plain, recorded))
        whole = whole and not any(isinstance(x, Tensor) and x.requires_grad for x in results)
        # a tensor that wraps others, as a plain leaf times the norm of split ones is
        whole = whole and all(isinstance(x, FakeTensor) for x in results if isinstance(x, Tensor))
        # what depends on no leaf is the same for all, and stays where it is
        for node in recorded:
            if any(arg in depends for arg in node.all_input_nodes):
                depends.add(node)
        steps = [_Step(n, n.args, n.kwargs, dict(n.meta)) for n in recorded if n in depends]
        made = [mode.node_of(x) if whole and isinstance(x, Tensor) else None for x in results]
    finally:
        for node in reversed(recorded or _behind(first, depends)):
            if node in depends or not whole:
                mode.forget(node)
        for _, node in stands.values():
            mode.forget(node)
    if not whole:
        return None
    ends = [x if node not in depends else node for x, node in zip(results, made, strict=True)]
    places = [None if node is None else stands[node][1] for node in leaves]
    return _Recipe(places, steps, structure, ends)


def _behind(first: fx.Node, stands: set[fx.Node]) -> list[fx.Node]:
    """Return the nodes that were recorded after those that stand for leaves."""
    found, node = [], first.next
    while node.op != "root":
        if node not in stands:
            found.append(node)
        node = node.next
    return found


def _is_plain(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in ("aten", "prims")


def _again(mode: Recording, recipe: _Recipe, row: Sequence[Any]) -> Any:
    """Do to a row what was recorded of another one."""
    nodes: dict[fx.Node, fx.Node | None] = {}
    values: dict[fx.Node, Any] = {}
    for stand, x in zip(recipe.leaves, row, strict=True):
        if stand is not None:
            nodes[stand], values[stand] = mode.node_of(x), x
    for step in recipe.steps:
        nodes[step.node], values[step.node] = _copied(mode, step, nodes, values)
    found = [values[end] if isinstance(end, fx.Node) else end for end in recipe.results]
    return tree.unflatten(recipe.structure, found)


def _copied(
    mode: Recording, step: _Step, nodes: dict[fx.Node, fx.Node | None], values: dict[fx.Node, Any]
) -> tuple[fx.Node | None, Any]:
    target: Any = step.node.target
    value = step.meta["val"]
    if is_view(target):  # lies in the memory of its argument, and is recorded as ever
        args, kwargs = _mapped((step.args, step.kwargs), values)
        with mode:
            made = target(*args, **kwargs)
        return (mode.node_of(made) if isinstance(made, Tensor) else None), made
    if target is operator.getitem:
        value = values[step.args[0]][step.args[1]]
        if nodes[step.args[0]] is None:  # one of the parts of a split
            return mode.node_of(value), value
    elif isinstance(value, Tensor):
        value = mode.new(value)
    else:
        value = [x if x is None else mode.new(x) for x in value]
    node = mode.graph.create_node("call_function", target)
    # those given to `create_node` are searched for symbols, which takes as long as the rest of it
    node.args, node.kwargs = _mapped(step.args, nodes), _mapped(step.kwargs, nodes)
    node.meta = {**step.meta, "val": value}
    if isinstance(value, Tensor):
        mode.made_by(node, value)
    return node, value


def _mapped(value: Any, found: dict[fx.Node, Any]) -> Any:
    if isinstance(value, fx.Node):
        return found.get(value, value)
    if isinstance(value, (tuple, list)):
        return type(value)([_mapped(x, found) for x in value])
    return {name: _mapped(x, found) for name, x in value.items()} if isinstance(value, dict) else value
