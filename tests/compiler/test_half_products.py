"""Products in half precision on a CPU without them: computed in float32 when compiled, and told."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from programs import cut, lowered
from torch import Tensor, fx

import functrain as ft
from functrain.compiler import half_products, tracing

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def untold() -> Iterator[None]:
    told = set(half_products._told)
    half_products._told.clear()
    yield
    half_products._told.clear()
    half_products._told.update(told)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_products, "factor", lambda dtype: 200.0)


def draw(number: int, *shape: int) -> Tensor:
    return ft.random.normal(ft.random.key(number), shape)


def test_a_cpu_is_tried_in_milliseconds() -> None:
    start = time.perf_counter()
    found = {dtype: half_products._measured(dtype) for dtype in HALF}
    assert time.perf_counter() - start < 5.0  # 0.1 s on a quiet machine
    known = getattr(torch.cpu, "get_capabilities", dict)()
    if known.get("architecture") == "x86_64" and not known["avx512_f"]:
        assert all(ratio > half_products._SLOW for ratio in found.values())
    if known.get("amx_bf16"):
        assert found[torch.bfloat16] < 1.0


def test_a_probe_inside_of_a_trace_is_none_of_it() -> None:
    half_products.factor.cache_clear()
    graph = tracing.trace(lambda mode, x: ([x * half_products.factor(torch.bfloat16)], []), [torch.ones(3)]).graph
    assert [str(node.target) for node in graph.nodes if node.op == "call_function"] == ["aten.mul.Tensor"]


def _conv(x: Tensor, w: Tensor) -> Any:
    return F.conv2d(x.view(2, 2, 4, 4), w.view(4, 2, 2, 2))


def _attention(x: Tensor, w: Tensor) -> Any:
    return F.scaled_dot_product_attention(*[t.view(1, 2, 4, 8)[:, :, :, :4] for t in (x, w, x * w)], is_causal=True)


def _of_documents(x: Tensor, w: Tensor) -> Any:
    return ft.nn.attention(*[t.view(1, 2, 8, 4) for t in (x, w, x * w)], documents=torch.arange(8)[None] // 3)


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "mm": lambda x, w: torch.tanh(x.view(8, 8) @ w.view(8, 8)) @ x.view(8, 8),
    "addmm": lambda x, w: torch.addmm(x.view(8, 8)[0], x.view(8, 8), w.view(8, 8)),
    "bmm": lambda x, w: x.view(4, 4, 4) @ w.view(4, 4, 4),
    "baddbmm": lambda x, w: torch.baddbmm(x.view(4, 4, 4), x.view(4, 4, 4), w.view(4, 4, 4)),
    "convolution": lambda x, w: _conv(x, w[:32]),
    "attention": _attention,
    "attention by documents": _of_documents,
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_and_their_gradients_are_those_of_float32_rounded(
    name: str, slow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def value(x: Tensor, w: Tensor) -> Any:
        y = PRODUCTS[name](x, w)
        return torch.sum(torch.sin(y.float())), y

    dtype = torch.float16
    x, w = draw(1, 64).to(dtype), draw(2, 64).to(dtype)
    seen = _compiled_products(monkeypatch)
    gradient = ft.value_and_grad(value, argnums=(0, 1), has_aux=True)
    (_, y), grads = ft.compile(gradient)(x, w)
    assert seen and all(d == torch.float32 for d in seen), seen
    assert y.dtype == dtype and {g.dtype for g in grads} == {dtype}
    (_, want), wanted = gradient(x.float(), w.float())
    for got, exact in ((y, want), *zip(grads, wanted, strict=True)):
        torch.testing.assert_close(got.float(), exact, atol=6e-3, rtol=6e-3)


def _compiled_products(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Return a list that the dtype of every operand of a product is added to which torch's compiler gets."""
    found: list[torch.dtype] = []
    from functrain.compiler.inductor import lowering  # here: torch's compiler takes 2 s to load

    compile_fx_inner = lowering.compile_fx_inner

    def seen(module: fx.GraphModule, *args: Any, **options: Any) -> Any:
        for node in module.graph.nodes:
            if half_products._multiplies(node) or "addmm_" in str(node.target):
                found.extend(n.meta["val"].dtype for n in node.all_input_nodes if n.meta["val"].is_floating_point())
        return compile_fx_inner(module, *args, **options)

    monkeypatch.setattr(lowering, "compile_fx_inner", seen)
    return found


def _step(params: Any, batch: Any, key: Any) -> Any:
    hidden = torch.tanh(batch @ params[0])
    return ft.Loss(torch.sum((hidden @ params[1]).float() ** 2), torch.tensor(float(len(batch))), {})


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_of_half_precision_params_multiplies_in_float32_and_keeps_half(
    parts: int, slow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(monkeypatch)
    seen, programs = _compiled_products(monkeypatch), lowered(monkeypatch)
    params = [(draw(i, 16, 16) / 4).bfloat16() for i in range(2)]
    tx = ft.optim.sgd(0.1)
    step = ft.train_step(_step, tx, accumulate=parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = ft.init_state(params, tx, key=ft.random.key(0))
    batch = draw(5, 8, 16).bfloat16()
    new, _ = ft.compile(step)(state, batch)
    expected, _ = step(state, batch)
    assert seen and all(d == torch.float32 for d in seen), seen
    for a, b in zip(new.params, expected.params, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)
    kept = [x for p in programs if p.which == "forward" for x in p.results if x.dim() == 2]
    assert kept and {x.dtype for x in kept} == {torch.bfloat16}


def test_a_cpu_that_has_them_multiplies_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_products, "factor", lambda dtype: 0.5)
    seen = _compiled_products(monkeypatch)
    x = draw(1, 8, 8).bfloat16()
    torch.testing.assert_close(ft.compile(lambda x: x @ x.mT)(x), x @ x.mT)
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("dtype", HALF)
def test_who_asks_for_it_by_name_is_told_once(dtype: torch.dtype, slow: None) -> None:
    x = torch.ones(2, 2)
    named = str(dtype).removeprefix("torch.")
    policy = ft.Policy(compute=dtype)
    for make in (ft.mixed_precision, ft.autocast):
        half_products._told.clear()
        fn: Any = make(lambda x: x @ x, policy)
        with pytest.warns(
            UserWarning, match=f"{make.__name__}: on this CPU a matrix product in {named} takes 200 times"
        ):
            fn(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fn(x)
    half_products._told.clear()
    with pytest.warns(
        UserWarning, match=f"init_state: on this CPU a matrix product in {named} .* in eager, use float32"
    ):
        ft.init_state({"w": x.to(dtype)}, ft.optim.sgd(0.1), key=ft.random.key(0))


def test_who_does_not_or_where_it_is_fast_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ft.mixed_precision(lambda x: x @ x, "full")(x)
        monkeypatch.setattr(half_products, "factor", lambda dtype: 0.5)
        ft.mixed_precision(lambda x: x @ x, "bf16")(x)
