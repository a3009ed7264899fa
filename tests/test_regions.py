"""Laws of `transforms.regions`: every result of a region is a tensor of its own, sums are added to inside, and no value
changes."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import functrain as ft
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


def gradients(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return x.sin(), x.mT @ w, w.cos().sum(0)


def gradients_alone(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return x.mT @ w, w.cos().sum(0)


@pytest.mark.parametrize(("function", "inside"), [(gradients, 2), (gradients_alone, 1)])
def test_results_that_are_only_added_to_inputs_are_added_in_the_region(function: Any, inside: int) -> None:
    module, aten = outer(function), torch.ops.aten
    items = [node for node in module.graph.nodes if node.target is operator.getitem]
    count = len(items) // 2
    sums = [item for i, item in enumerate(items) if i % count >= count - 2]
    first = next(node for node in module.graph.nodes if node.op != "placeholder")
    for item in sums:
        with module.graph.inserting_before(first):
            into = module.graph.placeholder(f"into_{item.name}")
        with module.graph.inserting_after(item):
            total = module.graph.call_function(aten.add.Tensor, (into, item))
        with module.graph.inserting_after(total):
            write = module.graph.call_function(aten.copy_.default, (into, total))
        for node in (into, total, write):
            node.meta["val"] = item.meta["val"]
    module.graph.output_node().args = (tuple(item for item in items if item not in sums),)
    module.recompile()

    def run() -> list[Tensor]:
        shapes = [node.meta["val"].shape for node in module.graph.find_nodes(op="placeholder")]
        inputs = [ft.random.normal(ft.random.key(i), shape, torch.float64) for i, shape in enumerate(shapes)]
        return [*module(*inputs), *inputs]

    expected = run()
    regions.add_inside(module)
    module.graph.lint()
    # a product that is added as it is computed is rounded once less
    assert all(torch.allclose(a, b, rtol=1e-14) for a, b in zip(run(), expected, strict=True))
    calls = module.graph.find_nodes(op="call_function", target=INVOKE)
    assert [len(call.args) - 4 for call in calls] == [inside, inside]
    # torch's compiler leaves out a call that nobody takes a result of
    assert all(call.users for call in calls)
    # and a product is never there by itself
    assert not module.region.graph.find_nodes(op="call_function", target=aten.mm.default)
