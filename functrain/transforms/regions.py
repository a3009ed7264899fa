"""Regions of a compiled graph that return no memory of somebody else.

A region (`invoke_subgraph`, what `nn.stack` makes of a layer) often returns one of its arguments, or a view: the weight
that its backward pass needs, say. Inductor plans memory as if every result of a region were a tensor of its own. It
then gives the argument's memory to another value while the result is still to be read, and gradients are wrong by
orders of magnitude (torch 2.13). Here such results are taken outside, where the planner sees what they are. And a
result that the caller only adds to a sum in memory is added inside, so that it need not live until the region ends.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import fx

from functrain.transforms import graph_passes

aten = torch.ops.aten

# a view too, although its schema does not say so
_VIEWS = {aten._unsafe_view.default}


def unshare(module: fx.GraphModule) -> None:
    """Rewrite a graph in place so that every result of a region is a tensor of its own."""
    for region, nodes in _calls(module).items():
        # a copy: the graph of the backward pass may call the region of the forward pass, to compute it again
        own = copy.deepcopy(region)
        for name in {node.args[0].target for node in nodes}:
            setattr(module, name, own)
        unshare(own)
        _unshare_results(own, nodes)
    module.recompile()


def add_inside(module: fx.GraphModule) -> None:
    """Rewrite a graph in place so that a result of a region that every call adds to an input is added inside."""
    for region, calls in _calls(module).items():
        results = [{user.args[1]: user for user in call.users} for call in calls]
        common = set.intersection(
            *[{i for i, item in found.items() if graph_passes.addition(item)} for found in results]
        )
        # nobody would know that a region without results does anything
        if any(common == found.keys() for found in results):
            common.discard(min(common, key=lambda i: results[0][i].meta["val"].numel()))
        for i in sorted(common):
            _add_inside(region, i, [found[i] for found in results])
        graph_passes.write_early(region.graph)
        region.recompile()
    module.recompile()


def _add_inside(region: fx.GraphModule, index: int, items: list[fx.Node]) -> None:
    """Make the sums that one result of a region is added to, `items` in its calls, further arguments of it."""
    end: Any = region.graph.output_node()
    results = list(end.args[0])
    call: Any
    into: Any
    for item in items:
        into, total, write = graph_passes.addition(item)  # type: ignore[misc]  # every item is one
        call = item.args[0]
        call.args = (*call.args, into)
        call.meta.pop("eager_input_vals", None)  # the arguments as they were, which torch would read instead
        for node in (write, total, item):
            node.graph.erase_node(node)
    with region.graph.inserting_before(next(node for node in region.graph.nodes if node.op != "placeholder")):
        argument = region.graph.placeholder(f"total_{index}")
    with region.graph.inserting_before(end):
        total = region.graph.call_function(aten.add.Tensor, (argument, results[index]))
        write = region.graph.call_function(aten.copy_.default, (argument, total))
    for node in (argument, total, write):
        node.meta["val"] = into.meta["val"]
    results[index] = None
    end.args = (tuple(results),)
    if "user_visible_output_idxs" in end.meta:
        end.meta["user_visible_output_idxs"] = [i for i in end.meta["user_visible_output_idxs"] if i != index]


def _calls(module: fx.GraphModule) -> dict[fx.GraphModule, list[Any]]:
    """The calls of each region, which may go by several names."""
    calls: dict[fx.GraphModule, list[Any]] = {}
    node: Any
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph):
        calls.setdefault(getattr(module, node.args[0].target), []).append(node)
    return calls


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
