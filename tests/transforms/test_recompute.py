"""Laws of `recompute`: it changes no value, keeps its arguments alone, and says where it cannot be right."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from programs import cut
from torch import Tensor

import functrain as ft
from functrain.compiler import engine

F = torch.func
KEY = ft.random.key(3)
PARAMS = [
    {"w": ft.random.normal(ft.random.key(i), (4, 4), torch.float64), "b": 0.1 * torch.ones(4, dtype=torch.float64)}
    for i in range(3)
]
X = ft.random.normal(ft.random.key(7), (5, 4), torch.float64)
V = ft.random.normal(ft.random.key(8), (5, 4), torch.float64)
TWO = torch.stack([X, 2 * X])


def block(p: Any, x: Tensor, key: Tensor | None, *, scale: float, names: tuple[str, ...] = ("w", "b")) -> Any:
    h = ft.nn.dropout(torch.tanh(x @ p[names[0]] + p[names[1]]), 0.3, key)
    return {"y": h * scale + x, "key": key, "count": 3, "none": None}


def loss_of(block: Callable[..., Any]) -> Callable[..., Tensor]:
    def loss(params: Any, x: Tensor, key: Tensor = KEY) -> Tensor:
        for i, p in enumerate(params):
            found = block(p, x, ft.random.fold_in(key, i), scale=0.5)
            assert found["count"] == 3 and found["none"] is None and found["key"].dtype == torch.int32
            x = found["y"]
        return torch.sum(x**3)

    return loss


plain, recomputed = loss_of(block), loss_of(ft.recompute(block))
Case = Callable[[Callable[..., Tensor]], Any]

FIRST: dict[str, Case] = {
    "value_and_grad": lambda f: ft.value_and_grad(f)(PARAMS, X),
    "grad of torch.func": lambda f: F.grad(f, argnums=1)(PARAMS, X),
    "vjp": lambda f: F.vjp(lambda x: f(PARAMS, x), X)[1](torch.ones((), dtype=X.dtype)),
    "vmap": lambda f: ft.vmap(lambda x: f(PARAMS, x))(TWO),
    "vmap of grad": lambda f: ft.vmap(lambda x: ft.grad(f, argnums=1)(PARAMS, x))(TWO),
    "vmap of vmap of grad": lambda f: ft.vmap(ft.vmap(lambda x: ft.grad(f, argnums=1)(PARAMS, x)))(TWO[:, None]),
    "grad of vmap": lambda f: ft.grad(lambda p: torch.sum(ft.vmap(lambda x: f(p, x))(TWO)))(PARAMS),
    "jvp": lambda f: F.jvp(lambda x: f(PARAMS, x), (X,), (V,)),
    "jacrev": lambda f: F.jacrev(lambda x: f(PARAMS, x))(X),
    "jacfwd": lambda f: F.jacfwd(lambda x: f(PARAMS, x))(X),
    "per_example_grad": lambda f: ft.per_example_grad(lambda p, b, key: f(p, b, key))(PARAMS, X, KEY),
    "backward": lambda f: torch.autograd.grad(f(PARAMS, x := X.clone().requires_grad_()), x),
    "without grad": lambda f: f(PARAMS, X),
}
HIGHER: dict[str, Case] = {
    "hessian": lambda f: F.hessian(lambda x: f(PARAMS, x))(X[0]),
    "jacrev of jacrev": lambda f: F.jacrev(F.jacrev(lambda x: f(PARAMS, x)))(X[0]),
    "hvp": lambda f: F.jvp(ft.grad(lambda x: f(PARAMS, x)), (X,), (V,)),
    "grad of grad": lambda f: ft.grad(lambda p: ft.tree.norm(ft.grad(f)(p, X)))(PARAMS),
    "grad of grad of grad": lambda f: ft.grad(
        lambda x: torch.sum(ft.grad(lambda x: torch.sum(ft.grad(f, argnums=1)(PARAMS, x) ** 2))(x) ** 2)
    )(0.1 * X),
    "grad of backward": lambda f: torch.autograd.grad(
        torch.sum(torch.autograd.grad(f(PARAMS, x := X.clone().requires_grad_()), x, create_graph=True)[0] ** 2), x
    ),
}


@pytest.mark.parametrize("case", FIRST)
def test_recomputing_changes_no_bit(case: str) -> None:
    expected, found = FIRST[case](plain), FIRST[case](recomputed)
    assert all(torch.equal(a, b) for a, b in zip(ft.tree.leaves(expected), ft.tree.leaves(found), strict=True))


@pytest.mark.parametrize("case", HIGHER)
def test_higher_derivatives_are_those_of_the_function(case: str) -> None:
    # float64: the terms of a derivative of a derivative are added in another order
    assert ft.tree.allclose(HIGHER[case](recomputed), HIGHER[case](plain), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_that_torch_folds_by_who_requires_grad_keeps_its_bits(transposed: bool) -> None:
    x = ft.random.normal(KEY, (3, 40, 70)).mT if transposed else ft.random.normal(KEY, (3, 70, 40))
    w = ft.random.normal(KEY, (40, 30))

    def fn(w: Tensor, x: Tensor) -> Tensor:
        return torch.sum(torch.sin(x @ w))

    expected, found = ft.value_and_grad(fn)(w, x), ft.value_and_grad(ft.recompute(fn))(w, x)
    assert torch.equal(expected[0], found[0]) and torch.equal(expected[1], found[1])


@pytest.mark.parametrize(
    "grad", [ft.grad, F.grad, lambda f: F.jacrev(f), lambda f: lambda x: ft.vmap(ft.grad(f))(x[None])]
)
def test_a_result_that_nobody_reads_has_no_gradient(grad: Any) -> None:
    # the slope of sqrt at 0 is infinite, and zero times it is NaN
    fn = ft.recompute(lambda x: (x.sum(), torch.sqrt((x * 0).sum())))
    assert torch.all(grad(lambda x: fn(x)[0])(torch.ones(3)) == 1)


@pytest.mark.parametrize("grad", [ft.grad, F.grad])
@pytest.mark.parametrize("policy", ["nothing", "dots", 0.5])
def test_the_second_run_has_the_autocast_of_the_first(policy: Any, grad: Any) -> None:
    p, x = ft.tree.map(Tensor.float, (PARAMS[0], X))

    def fn(p: Any, x: Tensor) -> Tensor:
        return torch.tanh(x @ p["w"]) @ p["w"]

    def gradient(fn: Any) -> Any:
        return grad(ft.autocast(lambda p: torch.sum(fn(p, x) ** 2), "bf16"))(p)  # whose context ends before backward

    assert torch.equal(gradient(fn)["w"], gradient(ft.recompute(fn, policy))["w"])


def test_it_is_pure_and_leaves_arguments_untouched() -> None:
    before = ft.tree.map(torch.clone, (PARAMS, X))
    first, second = (ft.value_and_grad(recomputed)(PARAMS, X) for _ in range(2))
    pairs = zip(ft.tree.leaves((first, before)), ft.tree.leaves((second, (PARAMS, X))), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_only_the_arguments_are_kept() -> None:
    made: list[weakref.ref[Tensor]] = []

    def chain(x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.sin(x)
            made.append(weakref.ref(x))
        return torch.sum(x)

    # the last of the three is no input of a sine
    for fn, kept in ((chain, [True, True, False]), (ft.recompute(chain), [False] * 3)):
        made.clear()
        loss = fn(X.clone().requires_grad_())
        assert [ref() is not None for ref in made] == kept and loss.requires_grad


CAPTURES: dict[str, Callable[[], Any]] = {
    "grad": lambda: ft.grad(lambda w: ft.recompute(lambda x: torch.sum(x * w))(X))(X),
    "grad of torch.func": lambda: F.grad(lambda w: ft.recompute(lambda x: torch.sum(x * w))(X))(X),
    "a value made of it": lambda: F.grad(lambda w: ft.recompute(lambda x, v=2 * w: torch.sum(x * v))(X))(X),
    "around vmap": lambda: F.grad(lambda w: F.vmap(ft.recompute(lambda x: torch.sum(x * w)))(X).sum())(X[0]),
    "mapped": lambda: F.vmap(lambda w: ft.recompute(lambda x: torch.sum(x * w))(X[0]))(X),
    "forward": lambda: F.jvp(lambda w: ft.recompute(lambda x: torch.sum(x * w))(X), (X,), (X,)),
    "in a recomputed one": lambda: ft.grad(
        lambda w: ft.recompute(lambda w: ft.recompute(lambda x: torch.sum(x * w))(X))(w)
    )(X),
    "in a transform": lambda: F.grad(
        lambda w: ft.recompute(lambda u: torch.sum(F.grad(lambda x: torch.sum(x * u * w))(X)))(X)
    )(X),
}


@pytest.mark.parametrize("case", CAPTURES)
def test_a_differentiated_tensor_that_is_no_argument_is_an_error(case: str) -> None:
    with pytest.raises(ValueError, match="recompute: fn uses a tensor of shape .* pass it as an argument"):
        CAPTURES[case]()


def test_what_nobody_differentiates_may_be_closed_over() -> None:
    def inner(w: Tensor) -> Tensor:
        return torch.sum(F.vmap(lambda z: torch.sum(F.grad(lambda y: torch.sum(y * X[0] * w))(z) * w))(X))

    for grad in (ft.grad, F.grad):
        assert torch.equal(grad(ft.recompute(inner))(X[0]), grad(inner)(X[0]))
    with torch.no_grad():
        assert torch.equal(ft.recompute(lambda x: x * X)(X), X * X)


def test_forward_mode_of_forward_mode_is_an_error() -> None:
    # torch 2.13 returns zeros for the second forward derivative of every autograd.Function; when it no longer does,
    # the error can go
    with pytest.raises(NotImplementedError, match="forward mode of forward mode"):
        F.jacfwd(F.jacfwd(lambda x: recomputed(PARAMS, x)))(X[0])


def test_forward_mode_of_autograd_is_an_error() -> None:
    fn = ft.recompute(torch.sin, "dots")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X[0], X[0])
        with pytest.raises(NotImplementedError, match=r"came that of torch.autograd.forward_ad.*take torch.func.jvp"):
            fn(dual.requires_grad_())


# ---- compiled ---------------------------------------------------------------------------------------------------


def layers_of(block: Callable[..., Any]) -> Callable[..., ft.Loss]:
    def loss(params: Any, x: Tensor, key: Tensor) -> ft.Loss:
        keys = ft.random.split(key, len(params)).unbind()
        x = ft.nn.stack(lambda layer, x: block(*layer, x), list(zip(params[:-1], keys[:-1], strict=True)), x)
        total = ft.recompute(lambda p, x: ft.Loss(torch.sum(block(p, None, x)), x.new_ones(()), {}))(params[-1], x)
        return total

    return loss


def test_a_compiled_loss_has_the_gradients_of_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def block(p: Any, key: Tensor | None, x: Tensor) -> Tensor:
        return ft.nn.dropout(torch.tanh(x @ p["w"] + p["b"]), 0.3, key) + x

    expected = ft.value_and_grad(layers_of(block))(PARAMS, X, KEY)
    whole = ft.compile(ft.value_and_grad(layers_of(ft.recompute(block))))(PARAMS, X, KEY)
    cut(monkeypatch)
    in_pieces = ft.compile(ft.value_and_grad(ft.recompute_layers(layers_of(block), budget=0.5)))(PARAMS, X, KEY)
    for found in (whole, in_pieces):
        # float64 rounding of fused kernels
        assert ft.tree.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_a_compiled_forward_mode_of_reverse_mode() -> None:
    again = ft.recompute(lambda x: torch.sum(torch.sin(x) ** 2))
    found = ft.compile(lambda x, v: F.jvp(ft.grad(again), (x,), (v,))[1])(X, V)
    # float64 rounding of fused kernels
    assert torch.allclose(found, 2 * torch.cos(2 * X) * V, rtol=1e-12, atol=1e-12)


def test_a_call_inside_of_another_takes_forward_mode() -> None:
    plain = lambda x: torch.sum(torch.sin(x) ** 2)  # noqa: E731
    nested = ft.recompute(lambda x: ft.recompute(plain)(x))
    assert torch.equal(torch.func.jvp(nested, (X,), (X,))[1], torch.func.jvp(plain, (X,), (X,))[1])
    assert torch.allclose(torch.func.hessian(nested)(X), torch.func.hessian(plain)(X), rtol=1e-12, atol=1e-12)
    assert not engine.here.plain


def test_a_gradient_inside_of_a_loss_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch)
    inner = ft.grad(ft.recompute(lambda x: torch.sum(x**3)))
    found = ft.compile(ft.grad(lambda x: torch.sum(inner(x))))(X)
    # float64: two products
    assert torch.allclose(found, 6 * X, rtol=1e-15, atol=0.0)
    assert engine.here.depth == 0


def test_a_block_may_use_a_tensor_of_the_loss_when_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(params: Any, x: Tensor) -> Tensor:
        scale = torch.tanh(params[0]["b"])
        block = lambda p, x: torch.sin(x @ p["w"]) * scale  # noqa: E731
        return torch.sum(ft.nn.stack(block, params[1:], x) ** 2)

    cut(monkeypatch)
    found = ft.compile(ft.value_and_grad(ft.recompute_layers(loss)))(PARAMS, X)
    # float64 rounding of fused kernels
    assert ft.tree.allclose(found, ft.value_and_grad(loss)(PARAMS, X), rtol=1e-12, atol=1e-12)


# ---- layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "twice"), [(0.0, 4), (0.3, 3), (0.5, 2), (0.8, 1), (1.0, 0)])
def test_a_budget_recomputes_the_first_layers(budget: float, twice: int) -> None:
    runs: list[int] = []

    def loss(ws: list[Tensor], x: Tensor) -> Tensor:
        def block(layer: tuple[int, Tensor], x: Tensor) -> Tensor:
            runs.append(layer[0])
            return torch.sin(x @ layer[1])

        return torch.sum(ft.nn.stack(block, list(enumerate(ws)), x))

    ws = [p["w"] for p in PARAMS] + [PARAMS[0]["w"] + 1]
    expected = ft.value_and_grad(loss)(ws, X)
    runs.clear()
    found = ft.value_and_grad(ft.recompute_layers(loss, budget=budget))(ws, X)
    assert runs == [0, 1, 2, 3, *reversed(range(twice))]
    assert all(torch.equal(a, b) for a, b in zip(ft.tree.leaves(expected), ft.tree.leaves(found), strict=True))
    assert engine.here.layers[0] == 1.0


@pytest.mark.parametrize("budget", [-0.1, 1.1])
def test_a_budget_is_a_part(budget: float) -> None:
    with pytest.raises(ValueError, match=r"expected a budget in \[0, 1\]"):
        ft.recompute_layers(plain, budget=budget)
