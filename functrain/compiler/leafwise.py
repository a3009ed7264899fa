"""A compiler for updates of trees: leaves that are treated alike share one kernel.

An optimizer's update does the same few pointwise operations to hundreds of leaves. Compiled as one graph, that is a
loop for each leaf, and a C++ compiler takes half a minute over 50 of them. Here the graph is cut: the operations on
one leaf form a *column*; columns with the same operations share one kernel over a one-dimensional view whose length
is an argument; whatever else there is (norms, schedules, counters, leaves with matrix operations) stays an ordinary
graph, the *rest*. Columns and rest run in turn: a global norm, say, is a reduction in every column, a little
arithmetic in the rest, and the update in every column again.

Nothing here knows an optimizer: the columns are found in the graph.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from functrain.compiler import graph_passes
from functrain.compiler.columns import columns, is_scalar, value_of
from functrain.compiler.graph_passes import Name
from functrain.compiler.inductor import lowering

aten = torch.ops.aten


def compile_graph(graph: fx.Graph, mode: FakeTensorMode) -> lowering.Kernel:
    """Compile a graph of aten operations whose only side effects are writes to its inputs."""
    return _Plan(graph_passes.compute_once(graph), mode).run


class _Plan:
    """What a graph turns into: calls that read and fill a table of values, in order."""

    def __init__(self, graph: fx.Graph, mode: FakeTensorMode) -> None:
        self.nodes, self.mode = list(graph.nodes), mode
        self.placeholders = [node for node in self.nodes if node.op == "placeholder"]
        self.writes = [node for node in self.nodes if node.target is aten.copy_.default]
        self.results: list[Any] = list(self.nodes[-1].args[0])
        self.column_of = columns(self.nodes)
        self.sums = {n for n in self.nodes if _terms(n) and all(term in self.column_of for term in _terms(n))}
        self.turns = self._turns()
        self.calls = list(self._schedule())

    def run(self, args: list[Any]) -> list[Any]:
        values: dict[Any, Any] = dict(zip(self.placeholders, args, strict=True))
        args.clear()
        for call in self.calls:
            call(values)
        return [values[node] if isinstance(node, fx.Node) else node for node in self.results]

    def _turns(self) -> dict[fx.Node, int]:
        """Number the turn that computes each node: even turns are the rest's, odd ones the columns'."""
        turns: dict[fx.Node, int] = {}
        for node in self.nodes:
            column, turn = self.column_of.get(node), 0
            for arg in node.all_input_nodes:
                waits = column is not None and is_scalar(arg) and self.column_of.get(arg) is not None
                turn = max(turn, turns[arg] + (2 if waits else 0))
            turns[node] = turn if turn % 2 == (column is not None) else turn + 1
        # the rest computes as late as its users allow, so that there are few graphs of it
        last = max((turn for turn in turns.values() if turn % 2 == 0), default=0)
        for node in reversed(self.nodes):
            if node not in self.column_of and node.op == "call_function":
                users = [user for user in node.users if user.op == "call_function"]
                turns[node] = min([last, *(turns[user] - (user in self.column_of) for user in users)])
                # no value of several, such as the parts of a split, waits for another turn: each does by itself
                turns |= {user: turns[node] for user in users if user.target is operator.getitem}
        return turns

    def _schedule(self) -> Iterator[Callable[[dict[Any, Any]], None]]:
        pieces: dict[tuple[int, int], list[fx.Node]] = defaultdict(list)
        for node in self.nodes:
            if node.op == "call_function" and node not in self.writes and self._kept(node):
                pieces[self.turns[node], self.column_of.get(node, -1)].append(node)
        for write in self.writes:
            column, target = self.column_of.get(write, -1), write.args[0]
            # a leaf is overwritten in the turn after which nobody reads it any more
            readers = [self.turns[user] for user in target.users if user.op == "call_function"]
            turn = max([self.turns[write], *readers, *(t for t, c in pieces if c == column >= 0)])
            pieces[turn if turn % 2 == (column >= 0) else turn + 1, column].append(write)
        given = {*self.placeholders}
        kernels: dict[str, Any] = {}
        for turn in sorted({turn for turn, _ in pieces}):
            for node in self.nodes:
                if turn % 2 == 0 and node in self.sums and self.turns[node] <= turn and node not in given:
                    yield _sum(node)
                    given.add(node)
            made = [_Piece(nodes, given) for (t, _), nodes in pieces.items() if t == turn]
            alike: dict[str, list[_Piece]] = defaultdict(list)
            for piece in made:
                alike[piece.signature].append(piece)
            for signature, group in alike.items():
                if turn % 2 == 0:
                    yield _rest(group[0], self.mode)
                else:
                    kernel = kernels[signature] = kernels.get(signature) or group[0].compile_for_any_length()
                    yield _columns_call(kernel, group)
            given.update(node for piece in made for node in piece.outputs)

    def _kept(self, node: fx.Node) -> bool:
        """Tell whether somebody outside of the node's own piece needs its value."""
        column, turn = self.column_of.get(node), self.turns[node]
        users = [user for user in node.users if user.op != "output"]
        if node in self.results or any(self.column_of.get(user) != column for user in users):
            return True
        later = any(self.turns[user] > turn for user in node.users)
        return later and (column is None or is_scalar(node))  # a column's values are cheap to compute again


def _rest(piece: _Piece, mode: FakeTensorMode) -> Callable[[dict[Any, Any]], None]:
    kernel = lowering.compile_graph(piece.graph, mode)

    def run(values: dict[Any, Any]) -> None:
        values.update(zip(piece.outputs, kernel([values[node] for node in piece.inputs]), strict=True))

    return run


def _columns_call(kernel: lowering.Kernel, pieces: list[_Piece]) -> Callable[[dict[Any, Any]], None]:
    """Run one kernel over all columns that are alike, each by itself: joining small ones to one takes longer."""
    shapes = [[value_of(node).shape for node in piece.outputs] for piece in pieces]

    def run(values: dict[Any, Any]) -> None:
        for piece, sizes in zip(pieces, shapes, strict=True):
            results = kernel([_line(values[node]) for node in piece.inputs])
            for node, result, size in zip(piece.outputs, results, sizes, strict=True):
                values[node] = result.view(size)

    return run


def _sum(node: fx.Node) -> Callable[[dict[Any, Any]], None]:
    """Add the columns' numbers, outside of any graph: one with an input for each leaf would take long to compile."""
    terms = _terms(node)

    def run(values: dict[Any, Any]) -> None:
        values[node] = torch.stack([values[term] for term in terms]).sum()

    return run


def _terms(node: fx.Node) -> list[fx.Node]:
    """What a node adds up, if it is the sum of stacked sums that nobody else reads."""
    terms = graph_passes.stacked_numbers(node)
    alone = all({user.target for user in term.users} == {aten.unsqueeze.default} for term in terms)
    return terms if alone and all(t.target is aten.sum.default and len(t.users) == 1 for t in terms) else []


def _line(value: Tensor) -> Tensor:
    return value if value.dim() <= 1 else value.view(-1)


class _Piece:
    """A graph of its own that computes some nodes from values that are there already."""

    def __init__(self, nodes: list[fx.Node], given: set[fx.Node]) -> None:
        self.outputs = [node for node in nodes if node.target is not aten.copy_.default]
        body, self.inputs = _between(nodes, given)
        self.body = sorted(body, key=lambda node: node.target is aten.copy_.default)  # stable: the writes come last
        names = {node: Name(f"n{i}") for i, node in enumerate([*self.inputs, *self.body])}
        lines = [(value_of(node).dtype, is_scalar(node)) for node in self.inputs]
        calls = [(str(n.target), fx.node.map_arg((n.args, n.kwargs), names.__getitem__)) for n in self.body]
        self.signature = repr((lines, calls, [names[node] for node in self.outputs]))

    @cached_property
    def graph(self) -> fx.Graph:
        """What is compiled, for one of those that are alike."""
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        for i, node in enumerate(self.inputs):
            copies[node] = graph.placeholder(f"input_{i}")
            copies[node].meta["val"] = node.meta["val"]
        for node in self.body:
            copies[node] = graph.node_copy(node, lambda arg: copies[arg])
        graph.output(tuple([copies[node] for node in self.outputs]))
        return graph

    def compile_for_any_length(self) -> lowering.Kernel:
        """Return the kernel of this piece for leaves of any length, which takes each as one dimension."""
        lines = [not is_scalar(node) for node in self.inputs]
        return lowering.compile_for_any_length(self.graph, [value_of(node).dtype for node in self.inputs], lines)


def _between(nodes: list[fx.Node], given: set[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return what must be computed for `nodes`, in order, and which given values it starts from.

    Both in an order that depends on the operations alone, so that equal columns give equal graphs. Not recursive: an
    update may be thousands of operations deep.
    """
    body: list[fx.Node] = []
    inputs: list[fx.Node] = []
    seen: set[fx.Node] = set()
    queue = [(node, False) for node in reversed(nodes)]
    while queue:
        node, ready = queue.pop()
        if ready:
            body.append(node)
        elif node not in seen:
            seen.add(node)
            if node in given:
                inputs.append(node)
            else:
                queue.append((node, True))
                queue.extend((arg, False) for arg in reversed(node.all_input_nodes))
    return body, inputs
