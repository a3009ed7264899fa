"""Results of a backward program that are only added to sums: added within the program, in the sums' memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from functrain.compiler import graph_passes
from functrain.compiler.parts import BACKWARD

aten = torch.ops.aten


class Chain:
    """What is done with one result of a call, until it is written into an input: it can be done inside of the call."""

    def __init__(self, nodes: list[fx.Node]) -> None:
        self.nodes = nodes  # the item, operations on it, and the write
        inside = {*nodes}
        self.others = list(dict.fromkeys(i for node in nodes[1:] for i in node.all_input_nodes if i not in inside))
        names: dict[Any, Any] = {node: graph_passes.Name(f"n{i}") for i, node in enumerate([*nodes, *self.others])}
        self.key = repr([(str(n.target), fx.node.map_arg((n.args, n.kwargs), names.get)) for n in nodes[1:]])


def additions(graph: fx.Graph) -> dict[fx.Node, dict[int, Chain]]:
    """Find the results of backward programs that are only added to inputs of the graph, in their memory."""
    found: dict[fx.Node, dict[int, Chain]] = {}
    for call in graph.find_nodes(op="call_function", target=BACKWARD):
        for item in call.users:
            nodes: list[Any] = [item]
            node: Any = item
            while len(node.users) == 1 and node.target is not aten.copy_.default:
                node = next(iter(node.users))
                nodes.append(node)
            simple = all(n.target in POINTWISE for n in nodes[1:-1])
            if len(nodes) < 3 or node.target is not aten.copy_.default or not simple:
                continue
            chain = Chain(nodes)
            target, index = node.args[0], item.args[1]
            numbers = all(n.op == "placeholder" and n.meta["val"].dim() == 0 for n in chain.others if n is not target)
            if target.op == "placeholder" and {*target.users} <= {*nodes} and numbers:
                found.setdefault(call, {})[index] = chain
    return found


POINTWISE = {aten.add.Tensor, aten.mul.Tensor, aten._to_copy.default, torch.ops.prims.convert_element_type.default}


def with_chains(module: fx.GraphModule, inside: dict[int, Chain]) -> fx.GraphModule:
    """Return a copy of a backward program that does `inside` itself, for which it gets further inputs."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.find_nodes(op="placeholder"):
        copies[node] = graph.node_copy(node)
    chains = sorted(inside.items())
    extra = [graph.placeholder(f"total_{i}_{j}") for i, chain in chains for j in range(len(chain.others))]
    for node in module.graph.nodes:
        if node.op not in ("placeholder", "output"):
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    end: Any = module.graph.output_node()
    results = [copies[n] if isinstance(n, fx.Node) else n for n in end.args[0]]
    more = iter(extra)
    for i, chain in chains:
        own = {chain.nodes[0]: results[i]}
        for other in chain.others:
            own[other] = next(more)
            own[other].meta["val"] = other.meta["val"]
        for node in chain.nodes[1:]:
            own[node] = graph.node_copy(node, lambda n, own=own: own[n])  # type: ignore[misc]
        results[i] = None
    graph.output(tuple(results))
    graph_passes.write_early(graph)
    return fx.GraphModule({}, graph)
