"""What is drawn from a key is drawn again in a compiled backward pass: no mask of a dropout is kept for it."""

from __future__ import annotations

from typing import Any

import torch
from memory import peak_bytes
from torch import Tensor, fx

import functrain as ft
from functrain.transforms import engine, graph_passes, inductor, redrawing

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


def test_a_loss_compiled_in_pieces_keeps_no_mask() -> None:
    saved: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        saved.append(value.detach())
        return value

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value)
    with torch.no_grad(), engine.compiling_losses(), hooks:
        grads = ft.grad(loss_fn)(*problem(), KEY)
    assert saved and all(value.is_floating_point() or value.numel() <= 2 for value in saved)
    assert_equal_to_eager(grads)


def test_a_gradient_compiled_as_a_whole_keeps_no_words() -> None:
    compiled = ft.compile(ft.grad(loss_fn))
    args = (*problem(), KEY)
    assert_equal_to_eager(compiled(*args))
    activation = 4 * ROWS * WIDTH
    # of each of three layers what went into the dropout and what came out, and one to work in; words would be two more
    assert peak_bytes(lambda: compiled(*args)) < 7.1 * activation


def functional(fn: Any, inputs: list[Tensor], edit: Any) -> Any:
    """Trace `fn`, have the graph without writes edited, and return what runs it."""
    with torch.no_grad(), engine.tracing_operations():
        graph = inductor.trace(fn, inputs)

    def compiler(module: fx.GraphModule) -> Any:
        edit(module.graph)
        module.graph.lint()
        module.recompile()
        return module

    return inductor.compile_functional(graph, inputs, compiler)


def test_readers_on_both_sides_of_a_product_draw_for_themselves() -> None:
    def fn(x: Tensor, key: Tensor) -> list[Tensor]:
        words, few = ft.random.bits(key, tuple(x.shape)), ft.random.bits(key, (64, 64))
        return [x + words, words - x, few + 1, x @ x, x * words, x + 2 * words, few * 2]

    draws: list[int] = []

    def edit(graph: fx.Graph) -> None:
        for _ in range(2):
            redrawing.draw_again(graph, graph_passes.is_product)
            draws.append(len(graph.find_nodes(op="call_function", target=torch.ops.aten.arange.default)))

    x = ft.random.normal(KEY, (128, 128))
    kernel = functional(fn, [x, KEY], edit)
    assert draws == [3, 3]  # the words once on each side, the few in all
    for a, b in zip(kernel(x, KEY), fn(x, KEY), strict=True):
        assert torch.equal(a, b)


def test_only_what_is_drawn_is_marked() -> None:
    def fn(x: Tensor, row: Tensor, key: Tensor) -> list[Tensor]:
        return [ft.random.bits(key, tuple(x.shape)) > 7, x > 7, x.sum(1) * row.sum(), ft.random.bits(key, (8,)) > 7]

    marked: list[fx.Node] = []

    def edit(graph: fx.Graph) -> None:
        redrawing.mark(graph)
        marked.extend(node for node in graph.nodes if "recompute" in node.meta)

    x = torch.ones(128, 128)
    functional(fn, [x, x[0], KEY], edit)
    assert len([node for node in marked if node.target is torch.ops.aten.gt.Scalar]) == 1
    assert all(node.meta["val"].shape.numel() == 128 * 128 for node in marked)
