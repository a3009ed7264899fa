"""Laws of `transforms.regions`: every result of a region is a tensor of its own, and no value changes."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from functrain.transforms import regions

INVOKE = torch.ops.higher_order.invoke_subgraph


def returns_its_argument(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return x.sin(), w.mT


def returns_views_of_one_value(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    y = x @ w
    return y.mT, y[0], y.cos()


def returns_a_value_and_a_part_of_it(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    y = x @ w
    return y, y.split(2)[1], y.flatten()


REGIONS = [returns_its_argument, returns_views_of_one_value, returns_a_value_and_a_part_of_it]


def outer(function: Any) -> fx.GraphModule:
    """Two calls of one region, as torch's partitioner writes them; the second reads a result of the first."""
    with FakeTensorMode() as mode:
        x, w = (torch.empty(4, 4, dtype=torch.float64) for _ in range(2))
    region = make_fx(function)(x, w)
    region.graph.output_node().args = (tuple(region.graph.output_node().args[0]),)
    graph = fx.Graph()
    inputs = [graph.placeholder("x"), graph.placeholder("w")]
    for node, value in zip(inputs, (x, w), strict=True):
        node.meta["val"] = value
    results: list[fx.Node] = []
    first, operand = graph.get_attr("region"), inputs[0]
    for number in range(2):
        attribute = first if number == 0 else graph.get_attr("region")
        call = graph.call_function(INVOKE, (attribute, "region", operand, inputs[1]))
        for i, inner in enumerate(region.graph.output_node().args[0]):
            result = graph.call_function(operator.getitem, (call, i))
            result.meta["val"] = inner.meta["val"]
            results.append(result)
        with mode:
            operand = graph.call_function(torch.ops.aten.add.Tensor, (inputs[0], inputs[1]))
            operand.meta["val"] = x + w
    graph.output(tuple(results))
    return fx.GraphModule({"region": region}, graph)


def storages_are_distinct(region: fx.GraphModule) -> bool:
    nodes = [*region.graph.find_nodes(op="placeholder"), *region.graph.output_node().args[0]]
    storages = [id(node.meta["val"].untyped_storage()) for node in nodes if node is not None]
    return len(set(storages)) == len(storages)


@pytest.mark.parametrize("function", REGIONS)
def test_results_are_tensors_of_their_own_and_values_stay(function: Any) -> None:
    module = outer(function)
    x, w = (torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(2))
    expected = [value.clone() for value in module(x, w)]
    assert not storages_are_distinct(module.region)
    regions.unshare(module)
    module.graph.lint()
    assert storages_are_distinct(module.region)
    found = module(x, w)
    assert len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    metas = [node.meta["val"] for node in module.graph.output_node().args[0]]
    assert [(m.shape, m.stride()) for m in metas] == [(value.shape, value.stride()) for value in found]
