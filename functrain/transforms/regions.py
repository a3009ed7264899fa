"""Regions of a compiled graph that return no memory of somebody else.

A region (`invoke_subgraph`, what `nn.stack` makes of a layer) often returns one of its arguments, or a view: the weight
that its backward pass needs, say. Inductor plans memory as if every result of a region were a tensor of its own. It
then gives the argument's memory to another value while the result is still to be read, and gradients are wrong by
orders of magnitude (torch 2.13). Here such results are taken outside, where the planner sees what they are.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# a view too, although its schema does not say so
_VIEWS = {aten._unsafe_view.default}


def unshare(module: fx.GraphModule) -> None:
    """Rewrite a graph in place so that every result of a region is a tensor of its own."""
    calls: dict[fx.GraphModule, list[Any]] = {}  # one region may go by several names
    node: Any
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph):
        calls.setdefault(getattr(module, node.args[0].target), []).append(node)
    for region, nodes in calls.items():
        # a copy: the graph of the backward pass may call the region of the forward pass, to compute it again
        own = copy.deepcopy(region)
        for name in {node.args[0].target for node in nodes}:
            setattr(module, name, own)
        unshare(own)
        _unshare_results(own, nodes)
    module.recompile()


def _unshare_results(region: fx.GraphModule, calls: list[fx.Node]) -> None:
    end: Any = region.graph.output_node()
    results = list(end.args[0])
    arguments = region.graph.find_nodes(op="placeholder")
    indices: dict[fx.Node, list[int]] = {}
    for i, result in enumerate(results):
        if isinstance(result, fx.Node):
            indices.setdefault(_base(result), []).append(i)
    shared = {base: found for base, found in indices.items() if base in arguments or len(found) > 1}
    # of several results with one memory, the first is replaced by the whole value, of which all of them are made
    whole = {base: found[0] for base, found in shared.items() if base not in arguments}
    outside = {i: results[i] for found in shared.values() for i in found}
    for call in calls:
        _take_outside(call, dict(zip(arguments, call.args[2:], strict=True)), whole, outside)
    kept = [None if i in outside else result for i, result in enumerate(results)]
    for base, i in whole.items():
        kept[i] = base
    end.args = (tuple(kept),)
    if "user_visible_output_idxs" in end.meta:
        end.meta["user_visible_output_idxs"] = [i for i in end.meta["user_visible_output_idxs"] if kept[i] is not None]
    region.recompile()


def _take_outside(
    call: fx.Node, values: dict[fx.Node, Any], whole: dict[fx.Node, int], outside: dict[int, fx.Node]
) -> None:
    """Make the results `outside` of one call from its arguments and the results that are `whole`."""
    graph = call.graph
    users: list[tuple[fx.Node, Any]] = [(user, user.args[1]) for user in call.users]

    def made(node: fx.Node) -> Any:
        if node not in values:
            values[node] = graph.node_copy(node, made)
            args, kwargs = fx.node.map_arg((values[node].args, values[node].kwargs), lambda arg: arg.meta["val"])
            values[node].meta = {"val": values[node].target(*args, **kwargs)}
        return values[node]

    for user, index in users:
        if index in outside:
            with graph.inserting_before(user):
                for base, i in whole.items():
                    if base not in values:
                        values[base] = graph.call_function(operator.getitem, (call, i))
                        values[base].meta = {"val": base.meta["val"]}
                user.replace_all_uses_with(made(outside[index]))
            graph.erase_node(user)


def _base(node: fx.Node) -> fx.Node:
    """Follow views to the value that has the memory."""
    while _is_view(node):
        node = node.all_input_nodes[0]
    return node


def _is_view(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return _is_view(node.all_input_nodes[0])
    return isinstance(node.target, torch._ops.OpOverload) and (node.target.is_view or node.target in _VIEWS)
