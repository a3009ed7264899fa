"""Segments: what lies between two calls of a cut graph, a program of its own.

A node belongs to the segment behind the last call that it depends on.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from functrain.compiler import graph_passes
from functrain.compiler.adding import POINTWISE
from functrain.compiler.parts import BACKWARD, CALL, FORWARD, ZEROS

aten = torch.ops.aten
# oneDNN's LSTM, which torch's compiler has for inference alone
AS_THEY_ARE = {aten.mkldnn_rnn_layer.default, aten.mkldnn_rnn_layer_backward.default}
_CALLS = {FORWARD, BACKWARD, CALL, ZEROS}
_TINY = 2**14  # elements: eager operations on as many cost little more than a program's call


def runs_as_it_is(target: Any) -> bool:
    """Tell whether an operation stands in the list by itself: one that torch's compiler lacks, and what ranks say to
    each other, which must begin and end at its place."""
    return target in AS_THEY_ARE or getattr(target, "namespace", None) == "functrain_ranks"


def is_call(node: Any) -> bool:
    return node.target in _CALLS or runs_as_it_is(node.target)


def _wait_late(graph: fx.Graph) -> None:
    """Let sums over ranks begin as soon as what they add is there, and let what waits for them come last: the backward
    pass goes on beside them."""
    late: set[fx.Node] = set()
    order = {node: i for i, node in enumerate(graph.nodes)}
    end = graph.output_node()
    for node in list(graph.nodes):
        name = str(node.target) if runs_as_it_is(node.target) else ""
        if node is end:
            continue
        if name.startswith("functrain_ranks.finish") or any(i in late for i in node.all_input_nodes):
            late.add(node)
            end.prepend(node)
        elif name.startswith("functrain_ranks.begin"):
            max(node.all_input_nodes, key=order.__getitem__).append(node)
            for item in list(node.users):
                node.append(item)


def levels_of(graph: fx.Graph) -> tuple[list[fx.Node], dict[fx.Node, int]]:
    """Return the calls, and for each other node the number of calls behind which it is computed."""
    _wait_late(graph)
    calls: list[fx.Node] = []
    order: dict[fx.Node, int] = {}
    free: set[fx.Node] = set()  # what depends on inputs alone can be computed as late as somebody wants it
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            order[node] = 0
            free.add(node)
        elif is_call(node):
            calls.append(node)
            order[node] = len(calls)
        else:
            order[node] = max([order[i] for i in node.all_input_nodes], default=0)
            if all(i in free for i in node.all_input_nodes):
                free.add(node)
    for node in reversed(list(graph.nodes)):
        parts = node.target is operator.getitem or any(u.target is operator.getitem for u in node.users)
        if node.op != "call_function" or node in calls or parts:  # parts of a split stay with it
            continue
        if node.target is aten.copy_.default:
            # a tensor is overwritten behind the last that reads it
            target: Any = node.args[0]
            users = [u for u in target.users if u.op != "output"]
            order[node] = max([order[node], *[order[u] for u in users]])
        elif node in free:
            wanted = [len(calls) if u.op == "output" else order[u] - (u in calls) for u in node.users]
            latest = min(wanted, default=0)
            # a cast of a layer's weights right before the layer, for which one small program stands for all of them
            if latest == len(calls) or node.target in _CASTS or node.meta.get("drawn again"):
                order[node] = latest
    inner = [n for n in graph.nodes if n.op == "call_function" and not is_call(n) and not is_item(n)]
    return calls, {node: order[node] for node in inner}


_CASTS = {aten._to_copy.default, torch.ops.prims.convert_element_type.default}


def size(graph: fx.Graph) -> int:
    return sum(node.op == "call_function" and not is_item(node) for node in graph.nodes)


def results_of(graph: fx.Graph) -> list[Any]:
    end: Any = graph.output_node()
    return list(end.args[0])


def is_item(node: Any) -> bool:
    """Tell whether a node is one result of a call."""
    return node.target is operator.getitem and is_call(node.args[0])


def is_cut(graph: fx.Graph) -> bool:
    return any(is_call(node) for node in graph.nodes)


def is_small_talk(nodes: list[fx.Node]) -> bool:
    """Tell whether operations are best done as they stand: views, and a few on small tensors that share nothing."""
    inside = {*nodes}
    results = sum(any(u not in inside for u in node.users) for node in nodes)
    for node in nodes:
        value = node.meta["val"]
        view = graph_passes.is_view(node.target)
        if not view and not (isinstance(value, Tensor) and value.numel() <= _TINY and node.target in POINTWISE):
            return False
    return len(nodes) <= 2 * results


def extract(nodes: list[fx.Node]) -> tuple[fx.Graph, list[fx.Node], list[fx.Node]]:
    """Make a graph of its own of some nodes; also return what it is given, and which nodes it returns."""
    inside, graph = {*nodes}, fx.Graph()
    given = _given(nodes, inside)
    copies: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(given):
        copies[node] = graph.placeholder(f"input_{i}")
        copies[node].meta["val"] = node.meta["val"]
    for node in sorted(nodes, key=lambda node: node.target is aten.copy_.default):  # stable: the writes come last
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    made = [node for node in nodes if any(u not in inside for u in node.users)]
    graph.output(tuple([copies[node] for node in made]))
    return graph, given, made


def take(nodes: list[fx.Node]) -> tuple[fx.Graph, list[fx.Node], list[fx.Node]]:
    """Do as `extract`, with the graph of the nodes itself, in which nothing else stays. Their writes come last there.

    An update has thousands of nodes, and to copy one takes as long as to record it.
    """
    graph, inside = nodes[0].graph, {*nodes}
    end = graph.output_node()
    given = _given(nodes, inside)
    made = [node for node in nodes if any(u not in inside for u in node.users)]
    with graph.inserting_before(next(iter(graph.nodes))):
        for i, node in enumerate(given):
            own = graph.placeholder(f"input_{i}")
            own.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(own, delete_user_cb=inside.__contains__)
            inside.add(own)
    end.args = (tuple(made),)
    for node in reversed(list(graph.nodes)):
        if node not in inside and node is not end:
            graph.erase_node(node)
    return graph, given, made


def _given(nodes: list[fx.Node], inside: set[fx.Node]) -> list[fx.Node]:
    return list(dict.fromkeys(i for node in nodes for i in node.all_input_nodes if i not in inside))
