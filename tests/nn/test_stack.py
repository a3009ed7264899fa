"""nn.stack means the plain loop, and compiles a block once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from programs import Program, cut, lowered
from torch import Tensor

import functrain as ft
from functrain.compiler import engine

# float32 rounding of a few layers of tanh, whose products are added in another order
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def layer(seed: int, width: int = 4) -> dict[str, Tensor]:
    weight, bias = ft.random.split(ft.random.key(seed)).unbind()
    return {"w": ft.random.normal(weight, (width, width)), "b": ft.random.normal(bias, (width,))}


def block(scale: float) -> Callable[..., Tensor]:
    return lambda layer, x, shift: torch.tanh(x @ layer[0]["w"] + layer[0]["b"] + shift) * scale


def loss(params: Any, x: Tensor, block: Callable[[float], Callable[..., Tensor]] = block) -> Tensor:
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


def gradients(monkeypatch: pytest.MonkeyPatch, fn: Any, *args: Any) -> tuple[Any, list[Program]]:
    """Compile a value and its gradients, cut at layers; return both, and the programs."""
    cut(monkeypatch)
    programs = lowered(monkeypatch)
    return ft.compile(ft.value_and_grad(fn))(*args), programs


def layers_of(programs: list[Program]) -> tuple[int, int]:
    """The programs of layers each way; what lies between layers has no pass of its own."""
    return sum(p.which == "forward" for p in programs), sum(p.which == "backward" for p in programs)


def test_a_block_is_traced_and_compiled_once_for_all_layers_and_each_stack_has_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params, x = params_of(3, 2), torch.ones(2, 4)
    expected = ft.value_and_grad(loss)(params, x)
    traced: list[float] = []

    def noting(scale: float) -> Callable[..., Tensor]:
        return lambda *args: traced.append(scale) or block(scale)(*args)

    found, programs = gradients(monkeypatch, lambda params, x: loss(params, x, noting), params, x)
    assert ft.tree.allclose(found, expected, **CLOSE)
    assert traced == [1.0, 3.0] and layers_of(programs) == (2, 2)
    # before the layers, between their passes and behind them
    assert len(programs) == 4 + 3
    assert engine.here.cutter is None, "nothing of the trace outlives it"


def test_layers_of_another_shape_or_structure_have_their_own_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(layer: Any, x: Tensor) -> Tensor:
        return torch.tanh(x @ layer["w"] + (layer["b"] if "b" in layer else 0.0) + layer.get("c", 0.0))

    without = {"w": layer(5)["w"]}
    other = {"w": layer(6)["w"], "c": layer(7)["b"]}
    wide = {"w": torch.ones(4, 4), "b": torch.ones(2, 4)}
    params, x = {"l": [layer(0), without, other, layer(1), without, wide], "s": torch.ones(4)}, torch.ones(2, 4)

    def fn(params: Any, x: Tensor) -> Tensor:
        return torch.sum(ft.nn.stack(plain, params["l"], x * params["s"]))

    expected = ft.value_and_grad(fn)(params, x)
    found, programs = gradients(monkeypatch, fn, params, x)
    assert ft.tree.allclose(found, expected, **CLOSE)
    assert layers_of(programs) == (4, 4)


def test_a_block_may_return_views_of_what_it_was_given_and_one_value_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def masked(w: Tensor, x: Any) -> Any:
        h = torch.tanh(x["h"] @ w.mT + x["h"] @ w) * x["mask"]
        seen = {"mask": x["mask"], "shape": x["shape"].view(2, 2), "turned": x["turned"].mT}  # what it was given
        return {"h": h, "twice": h, "part": h.split(1)[1], **seen}

    def fn(params: Any, x: Tensor) -> Tensor:
        seen = {"mask": torch.ones(2, 1), "shape": torch.ones(2, 2), "turned": params[0]}
        x = ft.nn.stack(masked, params, {"h": x, "twice": x, "part": x[:1], **seen})
        x = ft.nn.stack(lambda w, x: x, params, x["twice"] * torch.sum(x["turned"]) + x["part"])
        return torch.sum(ft.nn.stack(lambda w, x: (x[0] @ w, x[1]), params, (x, 2.0))[0] ** 2)

    params, x = [layer(i)["w"] for i in range(3)], torch.linspace(0.0, 1.0, 8).view(2, 4)
    expected = ft.value_and_grad(fn)(params, x)
    found, _ = gradients(monkeypatch, fn, params, x)
    # relative to the largest: the products of three layers are some hundreds
    tops = [float(leaf.abs().max()) for leaf in ft.tree.leaves(expected)]
    for a, b, top in zip(ft.tree.leaves(found), ft.tree.leaves(expected), tops, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-5 * top)


def test_a_block_may_take_tensors_of_the_loss_from_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fn(params: Any, x: Tensor) -> Tensor:
        scale, shift = 2 * params[0], torch.tanh(x)  # of the loss, with a gradient and without one

        def around(w: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(x @ w) @ scale + shift + params[1][0] + constant

        return torch.sum(ft.nn.stack(around, params, x) ** 2)

    constant = torch.linspace(-1.0, 1.0, 4)
    params, x = [layer(i)["w"] for i in range(3)], torch.linspace(0.0, 1.0, 8).view(2, 4)
    expected = ft.value_and_grad(fn)(params, x)
    found, programs = gradients(monkeypatch, fn, params, x)
    assert layers_of(programs) == (2, 2), "the first x has no gradient"
    # a value and gradients of some hundreds, rounded at 6e-8 a few dozen times
    for a, b in zip(ft.tree.leaves(found), ft.tree.leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))


def test_layers_may_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fn(params: Any, x: Tensor) -> Tensor:
        pairs = list(zip(params[1:], params[:-1], strict=True))
        return torch.sum(ft.nn.stack(lambda pair, x: torch.tanh(x @ pair[0]) @ pair[1], pairs, x))

    params, x = list(ft.random.normal(ft.random.key(0), (4, 4, 4)).unbind()), torch.ones(2, 4)
    expected = ft.value_and_grad(fn)(params, x)
    assert ft.tree.allclose(gradients(monkeypatch, fn, params, x)[0], expected, **CLOSE)


def test_what_a_block_reads_may_change_from_stack_to_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    def fn(x: Tensor) -> Tensor:
        def scaled(_: None, x: Tensor) -> Tensor:
            return x * read["scale"]

        read = {"scale": 2.0}
        x = ft.nn.stack(scaled, [None, None], x)
        read["scale"] = 3.0
        return torch.sum(ft.nn.stack(scaled, [None], x))

    cut(monkeypatch)
    assert torch.equal(ft.compile(ft.grad(fn))(torch.ones(2)), torch.full((2,), 12.0))


def test_a_block_that_returns_another_tree_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def growing(layer: Any, x: Any) -> Any:
        return {**x, "new": x["h"]}

    cut(monkeypatch)
    gradient = ft.grad(lambda p: torch.sum(ft.nn.stack(growing, p, {"h": p[0]["w"]})["h"]))
    with pytest.raises(TypeError, match=r"a tree like x, \['h'\], came \['h', 'new'\]"):
        ft.compile(gradient)([layer(0), layer(1)])
    assert engine.here.depth == 0 and engine.here.cutter is None


def of_block(block: Callable[..., Tensor], aux: Any = None) -> Callable[..., Any]:
    return ft.compile(ft.grad(lambda p: (torch.sum(ft.nn.stack(block, p, p[0])), aux), has_aux=True))


def test_a_block_that_writes_into_its_layer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def writing(w: Tensor, x: Tensor) -> Tensor:
        w.detach().mul_(2.0)
        return x @ w

    cut(monkeypatch)
    with pytest.raises(TypeError, match=r"a block writes into a tensor that it was given.*x = x \+ 1 for x \+= 1"):
        of_block(writing)([layer(i)["w"] for i in range(2)])


def test_a_block_that_keeps_what_it_makes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Tensor] = []

    def keeping(w: Tensor, x: Tensor) -> Tensor:
        kept.append((x @ w).detach())
        return torch.tanh(x @ w)

    cut(monkeypatch)
    with pytest.raises(TypeError, match=r"a tensor of shape \(4, 4\) that was made while .* return it, in place of"):
        of_block(keeping, kept)([layer(i)["w"] for i in range(2)])


def test_a_stack_in_a_block_of_a_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    params, x = params_of(2, 2), torch.ones(2, 4)

    def fn(params: Any, x: Tensor) -> Tensor:
        def outer(layers: Any, x: Tensor) -> Tensor:
            return ft.nn.stack(block(0.5), [(p, None) for p in layers], x, 0.1)

        return torch.sum(ft.nn.stack(outer, [params["a"], params["b"]], x * params["s"]) ** 2)

    expected = ft.value_and_grad(fn)(params, x)
    found, programs = gradients(monkeypatch, fn, params, x)
    assert ft.tree.allclose(found, expected, **CLOSE)
    assert layers_of(programs) == (1, 1)


@pytest.mark.parametrize("view", [lambda w: w, lambda w: w.mT, lambda w: w.view(2, 8)])
def test_what_a_block_returns_of_a_layer_is_what_the_layer_was(
    view: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step overwrites the layers behind the last that reads them."""

    def step(params: Any, x: Tensor) -> Any:
        def seeing(w: Tensor, x: Any) -> Any:
            return {"h": torch.tanh(x["h"] @ w), "seen": view(w)}

        found = ft.nn.stack(seeing, params, {"h": x, "seen": view(torch.zeros(4, 4))})
        return [w - torch.mean(found["h"]) for w in params], found["seen"]

    cut(monkeypatch)
    params, x = [layer(i)["w"] for i in range(2)], torch.linspace(0.0, 1.0, 8).view(2, 4)
    expected = ft.tree.map(torch.clone, step(params, x))  # in eager a view of the layer
    found = ft.compile(step, donate=True)(params, x)
    assert torch.equal(found[1], expected[1])
    assert ft.tree.allclose(found, expected, **CLOSE)


def test_a_call_may_be_differentiated_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward program that writes to what was kept for it would leave the second a ruin."""

    def both(params: Any, x: Tensor) -> Any:
        leaves = [w.detach().requires_grad_() for w in params]
        with torch.enable_grad():
            h = ft.nn.stack(lambda w, x: torch.exp(torch.sin(x @ w)) * torch.tanh(x), leaves, x)
            first = torch.autograd.grad(torch.sum(h), leaves, retain_graph=True)
            return first, torch.autograd.grad(torch.sum(h**3), leaves)

    cut(monkeypatch)
    params, x = [layer(i)["w"] for i in range(3)], torch.linspace(0.0, 1.0, 128).view(32, 4)
    assert ft.tree.allclose(ft.compile(both)(params, x), both(params, x), rtol=1e-4, atol=1e-3)
