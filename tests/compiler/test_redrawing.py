"""What is drawn from a key is drawn again in a compiled backward pass: no mask of a dropout is kept for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory import peak_bytes
from programs import Program, cut, lowered
from torch import Tensor, fx

import functrain as ft
from functrain.compiler import cutting, engine, graph_passes, redrawing, tracing

ROWS, WIDTH = 2048, 64
KEY = ft.random.key(0)


def loss_fn(params: list[Tensor], x: Tensor, key: Tensor) -> Tensor:
    """A dropout that loops around it can take in, and one in each layer of a stack."""
    keys = ft.random.split(key, len(params)).unbind()
    h = ft.nn.dropout(torch.tanh(x @ params[0]), 0.1, keys[0])

    def block(layer: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        return x + ft.nn.dropout(torch.tanh(x @ layer[0]), 0.1, layer[1])

    return torch.mean(ft.nn.stack(block, list(zip(params[1:], keys[1:], strict=True)), h) ** 2)


def problem() -> tuple[list[Tensor], Tensor]:
    keys = ft.random.split(KEY, 4)
    return [ft.random.normal(key, (WIDTH, WIDTH)) / 8 for key in keys[:3]], ft.random.normal(keys[3], (ROWS, WIDTH))


def assert_equal_to_eager(grads: list[Tensor]) -> None:
    # float32 sums of 2048 products, in another order
    want = ft.grad(loss_fn)(*problem(), KEY)
    for a, b in zip(grads, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_a_loss_compiled_in_pieces_keeps_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch)
    programs = lowered(monkeypatch)
    assert_equal_to_eager(ft.compile(ft.grad(loss_fn))(*problem(), KEY))
    assert len(programs) == 5  # of the layers each way, before, between and behind them
    assert masks_of(programs) == []


def masks_of(programs: list[Program]) -> list[Any]:
    kept = [value for program in programs for value in program.results]
    return [(value.dtype, value.shape) for value in kept if not value.is_floating_point() and value.numel() > 2]


@pytest.mark.parametrize("in_layers", [True, False])
def test_the_mask_of_a_matrix_product_is_not_kept(in_layers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its backward pass needs nothing but the mask, which torch's partitioner would keep."""

    def block(layer: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        return x + ft.nn.dropout(torch.tanh(x) @ layer[0], 0.1, layer[1])

    def fn(params: list[Tensor], x: Tensor, key: Tensor) -> Tensor:
        layers = list(zip(params, ft.random.split(key, len(params)).unbind(), strict=True))
        if in_layers:
            return torch.mean(ft.nn.stack(block, layers, x) ** 2)
        for layer in layers * 5:  # of as many products that they are partitioned
            x = block(layer, x)
        return torch.mean(x**2)

    cut(monkeypatch)
    programs = lowered(monkeypatch)
    ft.compile(ft.grad(fn)).describe(*problem(), KEY)
    assert any(program.which == "backward" for program in programs)
    assert masks_of(programs) == []


def test_a_gradient_compiled_as_a_whole_keeps_no_words() -> None:
    compiled = ft.compile(ft.grad(loss_fn))
    args = (*problem(), KEY)
    assert_equal_to_eager(compiled(*args))
    activation = 4 * ROWS * WIDTH
    # of each of three layers what went into the dropout and what came out, and one to work in; words would be two more
    assert peak_bytes(lambda: compiled(*args)) < 7.1 * activation


def traced(fn: Any, tensors: list[Tensor]) -> tracing.Traced:
    cutter = cutting.Cutter(layers=False)
    with torch.no_grad(), engine.tracing_operations(cutter):
        return cutter.trace(lambda *xs: (fn(*xs), []), tensors)


def test_readers_on_both_sides_of_a_product_draw_for_themselves() -> None:
    def fn(x: Tensor, key: Tensor) -> list[Tensor]:
        words, few = ft.random.bits(key, tuple(x.shape)), ft.random.bits(key, (64, 64))
        return [x + words, words - x, few + 1, x @ x, x * words, x + 2 * words, few * 2]

    x = ft.random.normal(KEY, (128, 128))
    graph, draws = graph_passes.compute_once(traced(fn, [x, KEY]).graph), []
    for _ in range(2):
        redrawing.draw_again(graph, graph_passes.is_product)
        draws.append(len(graph.find_nodes(op="call_function", target=torch.ops.prims.iota.default)))
    assert draws == [3, 3]  # the words once on each side, the few in all
    graph.lint()
    for a, b in zip(fx.GraphModule({}, graph)(x, KEY), fn(x, KEY), strict=True):
        assert torch.equal(a, b)


def test_what_layers_share_and_nobody_has_drawn_is_computed_once() -> None:
    def fn(x: Tensor) -> list[Tensor]:
        places = torch.arange(128)
        angles, ahead = torch.cos(places[:, None] * places.float()), places > places[:, None]
        return [x + angles, x * ahead, x @ x, x * angles, x - ahead.float()]

    graph = graph_passes.compute_once(traced(fn, [ft.random.normal(KEY, (128, 128))]).graph)
    redrawing.draw_again(graph, graph_passes.is_product)
    found = [str(node.target).split(".")[1] for node in graph.nodes if node.op == "call_function"]
    assert (found.count("cos"), found.count("gt")) == (1, 1)


def test_only_what_is_drawn_is_marked() -> None:
    def fn(x: Tensor, row: Tensor, key: Tensor) -> list[Tensor]:
        return [ft.random.bits(key, tuple(x.shape)) > 7, x > 7, x.sum(1) * row.sum(), ft.random.bits(key, (8,)) > 7]

    x = torch.ones(128, 128)
    graph = traced(fn, [x, x[0], KEY]).graph
    redrawing.mark(graph)
    marked = [node for node in graph.nodes if "recompute" in node.meta]
    assert len([node for node in marked if node.target is torch.ops.aten.gt.Scalar]) == 1
    assert all(node.meta["val"].shape.numel() == 128 * 128 for node in marked)
