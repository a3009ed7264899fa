"""Where calls stand in a list: sums over ranks begin early, and what waits for them comes last."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

import functrain.sharding.operations  # noqa: F401  (its operations are in the graph)
from functrain.compiler import segments

ranks, aten = torch.ops.functrain_ranks, torch.ops.aten


def test_sums_begin_behind_what_they_add_and_are_waited_for_at_the_end() -> None:
    graph = fx.Graph()
    grad: Any = graph.placeholder("x")
    sums: list[Any] = []

    def add(grad: Any) -> None:
        begun = graph.call_function(ranks.begin_sum.default, ([grad], "data=2", "data"))
        flat = graph.call_function(operator.getitem, (begun, 0))
        done = graph.call_function(ranks.finish.default, ([flat],))
        sums.append(graph.call_function(aten.neg.default, (graph.call_function(operator.getitem, (done, 0)),)))

    made: list[Any] = []
    for i in range(3):  # three gradients, one after another, as of three layers
        grad = graph.call_function(aten.sin.default, (grad,))
        made.append(grad)
        if i == 0:
            add(grad)
    add(made[1])
    add(made[2])
    graph.output(tuple(sums))
    segments._wait_late(graph)
    graph.lint()
    names = [str(node.target).split(".")[1] for node in graph.nodes if "." in str(node.target)]
    assert names == ["sin", "begin_sum"] * 3 + ["finish", "neg"] * 3
