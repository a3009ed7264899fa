"""nn.stack means the plain loop, and compiles a block once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config

import functrain as ft
from functrain.transforms import compilation, engine, inductor


def layer(seed: int, width: int = 4) -> dict[str, Tensor]:
    weight, bias = ft.random.split(ft.random.key(seed)).unbind()
    return {"w": ft.random.normal(weight, (width, width)), "b": ft.random.normal(bias, (width,))}


def block(scale: float) -> Callable[..., Tensor]:
    return lambda layer, x, shift: torch.tanh(x @ layer[0]["w"] + layer[0]["b"] + shift) * scale


def loss(params: Any, x: Tensor) -> Tensor:
    x = ft.nn.stack(block(1.0), [(p, None) for p in params["a"]], x * params["s"], 0.1)
    x = ft.nn.stack(block(3.0), [(p, None) for p in params["b"]], x, 0.1)
    return torch.sum(x**2)


def params_of(a: int, b: int) -> dict[str, Any]:
    return {"s": torch.ones(4), "a": [layer(i) for i in range(a)], "b": [layer(10 + i) for i in range(b)]}


def test_stack_is_the_plain_loop() -> None:
    layers, x = [layer(i) for i in range(3)], torch.ones(2, 4)
    expected = x
    for p in layers:
        expected = block(1.0)((p, None), expected, 0.5)
    assert torch.equal(ft.nn.stack(block(1.0), [(p, None) for p in layers], x, 0.5), expected)
    assert ft.nn.stack(block(1.0), [], x, 0.5) is x


def graphs_of(monkeypatch: pytest.MonkeyPatch, fn: Any, *args: Any) -> tuple[Any, list[Any]]:
    graphs: list[Any] = []

    def aot_eager(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, inputs)

    def compile_differentiable(fn: Any, *, keep_less: bool) -> Any:
        return torch.compile(fn, backend=aot_eager, fullgraph=True, dynamic=False)

    monkeypatch.setattr(inductor, "compile_differentiable", compile_differentiable)
    # the limit counts the losses that every test of this process has compiled
    with engine.compiling_losses(), dynamo_config.patch(recompile_limit=1000):
        return ft.value_and_grad(fn)(*args), graphs


def regions(graphs: list[Any]) -> list[str]:
    return [n.args[1] for g in graphs for n in g.graph.nodes if "invoke_subgraph" in str(n.target)]


def test_a_block_is_compiled_once_for_all_layers_and_each_stack_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    params, x = params_of(3, 2), torch.ones(2, 4)
    expected = ft.value_and_grad(loss)(params, x)
    (value, grads), graphs = graphs_of(monkeypatch, loss, params, x)
    # float32 rounding of five tanh layers
    assert ft.tree.allclose((value, grads), expected, rtol=1e-5, atol=1e-5)
    found = regions(graphs)
    assert len(found) == 5 and len(set(found)) == 2
    assert len(set(found[:3])) == 1 and len(set(found[3:])) == 1
    assert engine.here.blocks == [], "nothing of the trace outlives it"


# torch's hint that the same layers in turn are compiled twice
@pytest.mark.filterwarnings("ignore:invoke_subgraph traced multiple backward")
def test_layers_of_another_shape_or_structure_have_their_own_region(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(layer: Any, x: Tensor) -> Tensor:
        return torch.tanh(x @ layer["w"] + (layer["b"] if "b" in layer else 0.0) + layer.get("c", 0.0))

    without = {"w": layer(5)["w"]}
    other = {"w": layer(6)["w"], "c": layer(7)["b"]}
    params, x = {"l": [layer(0), without, other, layer(1), without], "s": torch.ones(4)}, torch.ones(2, 4)

    def fn(params: Any, x: Tensor) -> Tensor:
        return torch.sum(ft.nn.stack(plain, params["l"], x * params["s"]))

    expected = ft.value_and_grad(fn)(params, x)
    got, graphs = graphs_of(monkeypatch, fn, params, x)
    assert ft.tree.allclose(got, expected, rtol=1e-5, atol=1e-5)
    found = regions(graphs)
    first, second = found[:2]  # the kind with one layer alone is no region
    assert found == [first, second, first, second] and first != second


def test_a_block_may_transpose_its_layer_and_return_a_tree_with_what_it_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def masked(w: Tensor, x: Any) -> Any:
        h = torch.tanh(x["h"] @ w.mT + x["h"] @ w) * x["mask"]
        return {"h": h, "mask": x["mask"], "shape": x["shape"].view(2, 2), "twice": h}

    def fn(params: Any, x: Tensor) -> Tensor:
        start = {"h": x, "mask": torch.ones(2, 1), "shape": torch.ones(2, 2), "twice": x}
        x = ft.nn.stack(lambda w, x: x, params, ft.nn.stack(masked, params, start)["twice"])
        return torch.sum(ft.nn.stack(lambda w, x: (x[0] @ w, x[1]), params, (x, 2.0))[0] ** 2)

    params, x = [layer(i)["w"] for i in range(3)], torch.linspace(0.0, 1.0, 8).view(2, 4)
    expected = ft.value_and_grad(fn)(params, x)
    got, graphs = graphs_of(monkeypatch, fn, params, x)
    assert ft.tree.allclose(got, expected, rtol=1e-5, atol=1e-5)
    # the first layer, whose x needs no gradient, is alone of its kind; and a number in x makes it the plain loop
    assert len(regions(graphs)) == 2 + 3 and len(set(regions(graphs))) == 2


def test_a_block_compiled_in_pieces_that_returns_another_tree_is_an_error() -> None:
    def growing(layer: Any, x: Any) -> Any:
        return {**x, "new": x["h"]}

    with engine.compiling_losses(), pytest.raises(Exception, match=r"a tree like x, \['h'\], came \['h', 'new'\]"):
        ft.grad(lambda p: torch.sum(ft.nn.stack(growing, p, {"h": p[0]["w"]})["h"]))([layer(0), layer(1)])
    assert engine.here.depth == 0


def test_what_a_region_cannot_take_is_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "_PIECEWISE_BYTES", 0)
    tx, batch = ft.optim.sgd(0.1), {"x": torch.ones(2, 4)}

    def taken_from_around(params: Any, batch: Any, key: Tensor) -> Tensor:
        scale = 2 * params[0]
        return torch.sum(ft.nn.stack(lambda w, x: torch.tanh(x @ w) @ scale, params, batch["x"]))

    def of_one_memory(params: Any, batch: Any, key: Tensor) -> Tensor:
        pairs = list(zip(params[1:], params[:-1], strict=True))
        return torch.sum(ft.nn.stack(lambda pair, x: torch.tanh(x @ pair[0]) @ pair[1], pairs, batch["x"]))

    whole = ft.random.normal(ft.random.key(0), (4, 4, 4))
    for loss, params, way in (
        (
            taken_from_around,
            [whole[i].clone() for i in range(3)],
            r"pass it, as in nn\.stack\(block, layers, x, mask\)",
        ),
        (of_one_memory, list(whole.unbind()), "share one memory: clone one of them"),
    ):
        with pytest.raises(NotImplementedError, match=way):
            ft.compile(ft.train_step(loss, tx))(ft.init_state(params, tx, key=ft.random.key(0)), batch)
    assert engine.here.depth == 0


def test_a_stack_in_a_block_of_a_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    params, x = params_of(2, 2), torch.ones(2, 4)

    def fn(params: Any, x: Tensor) -> Tensor:
        def outer(layers: Any, x: Tensor) -> Tensor:
            return ft.nn.stack(block(0.5), [(p, None) for p in layers], x, 0.1)

        return torch.sum(ft.nn.stack(outer, [params["a"], params["b"]], x * params["s"]) ** 2)

    expected = ft.value_and_grad(fn)(params, x)
    got, _ = graphs_of(monkeypatch, fn, params, x)
    assert ft.tree.allclose(got, expected, rtol=1e-5, atol=1e-5)
