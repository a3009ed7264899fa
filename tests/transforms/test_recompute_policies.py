"""Policies of `recompute`: what is kept is not computed again, and no number changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from queue import Queue
from threading import Thread
from typing import Any

import pytest
import torch
from programs import cut, lowered
from test_recompute import FIRST, HIGHER, KEY, PARAMS, X, block, loss_of, plain
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import functrain as ft
from functrain.transforms import rematerialized


class Counted(TorchDispatchMode):
    """Count the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(func._schema.name).removeprefix("aten::")] += 1
        return func(*args, **kwargs or {})


def counted(fn: Callable[[], Any]) -> Counter[str]:
    with Counted() as mode:
        fn()
    return mode.count


def mlp(p: Any, x: Tensor) -> Tensor:
    h = ft.checkpoint_name(x @ p["up"], "up")
    h = ft.checkpoint_name(torch.tanh(h), "tanh")
    return torch.sin(x + h @ p["down"])


P = {"up": 0.5 * torch.eye(4, 6, dtype=torch.float64), "down": 0.5 * torch.eye(6, 4, dtype=torch.float64)}


def summed(p: Any, x: Tensor, fn: Callable[..., Tensor]) -> Tensor:
    return torch.sum(fn(p, fn(p, x)) ** 2)


# the second product is not needed again for its own backward pass, but sin(x + product) is
AGAIN = {
    "nothing": {"mm": 4, "tanh": 2},
    "dots": {"tanh": 2},
    ("up",): {"mm": 2, "tanh": 2},
    ("tanh",): {"mm": 4},
    ("up", "tanh"): {"mm": 2},
    ("other",): {"mm": 4, "tanh": 2},
    0.0: {"mm": 4, "tanh": 2},
    0.5: {"mm": 2, "tanh": 2},
    1.0: {},
}


@pytest.mark.parametrize("policy", AGAIN, ids=str)
def test_what_is_kept_is_not_computed_again(policy: Any) -> None:
    fn = ft.recompute(mlp, policy)
    extra = counted(lambda: ft.grad(summed)(P, X, fn)) - counted(lambda: ft.grad(summed)(P, X, mlp))
    assert {name: extra[name] for name in ("mm", "tanh") if extra[name]} == AGAIN[policy]


def test_what_costs_most_is_kept_though_small_values_fill_the_room() -> None:
    def fn(w: Tensor, x: Tensor) -> Tensor:
        small = x[:, :2] + x[:, 2:]  # cheap, but more for its size than the product
        return torch.sum(torch.sin(small)) + torch.sum(torch.sin(x @ w))

    w = torch.ones(4, 6, dtype=torch.float64)
    # sin saves the product, 240 bytes, and the sum, 80: in 256 bytes one of them has room
    both = (0, 1)
    extra = counted(lambda: ft.grad(ft.recompute(fn, 0.8), argnums=both)(w, X))
    extra -= counted(lambda: ft.grad(fn, argnums=both)(w, X))
    assert extra["mm"] == 0 and extra["add"] == 1


@pytest.mark.parametrize("policy", ["nothing", "dots", ("other",), 0.0], ids=str)
def test_what_the_backward_pass_does_not_read_is_not_computed_again(policy: Any) -> None:
    def last(w: Tensor, x: Tensor) -> Tensor:
        return torch.exp(x) @ w

    def loss(w: Tensor, fn: Callable[..., Tensor]) -> Tensor:
        return torch.sum(fn(w, X))

    fn = ft.recompute(last, policy)
    extra = counted(lambda: ft.grad(loss)(P["up"][:4], fn)) - counted(lambda: ft.grad(loss)(P["up"][:4], last))
    assert extra["exp"] == 1 and extra["mm"] == 0


def test_products_are_kept_for_single_examples_too() -> None:
    def count(fn: Callable[..., Tensor]) -> int:
        found = counted(lambda: ft.per_example_grad(lambda p, x, key: summed(p, x, fn))(P, X, KEY))
        return found["mm"] + found["bmm"]

    plain, nothing, dots = (count(fn) for fn in (mlp, ft.recompute(mlp), ft.recompute(mlp, "dots")))
    assert plain <= dots < nothing


POLICIES: dict[str, dict[str, Any]] = {
    "dots": {"policy": "dots"},
    "named": {"policy": ("tanh",)},
    "a half": {"policy": 0.5},
    "offloaded": {"offload": (0, 1)},
    "named and offloaded": {"policy": ("tanh",), "offload": 1},
}


@pytest.mark.parametrize("case", [*FIRST, *HIGHER])
@pytest.mark.parametrize("options", POLICIES)
def test_no_policy_changes_a_number(options: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # as on an accelerator: copies are made, kept and read in place of the arguments
    monkeypatch.setattr(rematerialized, "in_host_memory", lambda x: False)

    def named(p: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return block(p, ft.checkpoint_name(torch.tanh(x), "tanh"), *args, **kwargs)

    expected = ({**FIRST, **HIGHER}[case])(loss_of(named))
    found = ({**FIRST, **HIGHER}[case])(loss_of(ft.recompute(named, **POLICIES[options])))
    tolerance = 0.0 if case in FIRST else 1e-12
    assert ft.tree.allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_arguments_wait_in_host_memory() -> None:
    params, x, key = ft.tree.map(Tensor.cuda, (PARAMS, X.repeat(1000, 1), KEY))
    held = []
    for options in ({}, {"offload": 1}):
        loss = loss_of(ft.recompute(block, **options))
        leaves = ft.tree.map(lambda leaf: leaf.detach().requires_grad_(), params)
        before = torch.cuda.memory_allocated()
        value = loss(leaves, x, key)
        held.append(torch.cuda.memory_allocated() - before)
        grads = torch.autograd.grad(value, ft.tree.leaves(leaves))
        expected = ft.tree.leaves(ft.grad(plain)(params, x, key))
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    assert held[1] < held[0]


def test_a_kept_value_that_is_written_over_is_computed_again() -> None:
    def writing(w: Tensor, x: Tensor) -> Tensor:
        return torch.exp((x @ w).mul_(2.0))

    def loss(w: Tensor, fn: Callable[..., Tensor]) -> Tensor:
        return torch.sum(fn(w, X))

    assert torch.equal(ft.grad(loss)(P["up"], ft.recompute(writing, "dots")), ft.grad(loss)(P["up"], writing))


@pytest.mark.parametrize("policy", ["dots", ("tanh",), 0.5], ids=str)
def test_a_function_that_caches_is_right(policy: Any) -> None:
    def caching(cache: list[Tensor]) -> Callable[..., Tensor]:
        def fn(p: Any, x: Tensor) -> Tensor:
            if not cache:
                cache.append(torch.cos(x.detach()) @ P["up"])
            h = ft.checkpoint_name(torch.tanh(x @ p["up"]), "tanh")
            return torch.sum((h * cache[0]) @ p["down"])

        return fn

    expected = ft.grad(caching([]))(P, X)
    assert ft.tree.allclose(ft.grad(ft.recompute(caching([]), policy))(P, X), expected, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("policy", ["dots", ("exp",), 0.5], ids=str)
def test_a_second_run_that_reads_what_the_first_did_not_is_done_again(policy: Any) -> None:
    calls: list[None] = []

    def twice_the_product(w: Tensor, x: Tensor) -> Tensor:
        calls.append(None)
        y = ft.checkpoint_name(torch.exp(x @ w), "exp")
        product = torch.abs(x.detach()) @ w  # nothing reads it for the backward pass, the first time
        doubled = product + product if len(calls) == 1 else torch.sqrt(4 * product * product)
        return torch.sum(y) + torch.sum(doubled)

    w = torch.ones(4, 6, dtype=torch.float64)
    expected = ft.grad(twice_the_product)(w, X)
    calls.clear()
    found = ft.grad(ft.recompute(twice_the_product, policy))(w, X)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("policy", ["nothing", "dots"])
@pytest.mark.parametrize("grad", [ft.grad, torch.func.grad])
def test_numbers_of_the_global_generator_are_an_error(grad: Any, policy: str) -> None:
    fn = ft.recompute(lambda x: torch.sum(torch.nn.functional.dropout(x, 0.5)), policy)
    with pytest.raises(ValueError, match=r"recompute: fn draws from torch's global generator.* functrain.random"):
        grad(fn)(X)


@pytest.mark.parametrize("policy", ["nothing", "dots"])
def test_a_thread_that_draws_beside_is_none_of_it(policy: str) -> None:
    asked: Queue[str] = Queue()
    drawn: Queue[Tensor] = Queue()
    loader = Thread(target=lambda: [drawn.put(torch.rand(2)) for _ in iter(asked.get, "end")])

    def waits(x: Tensor) -> Tensor:
        asked.put("draw")
        drawn.get()
        return torch.sum(torch.sin(x))

    loader.start()
    try:
        assert torch.equal(ft.grad(ft.recompute(waits, policy))(X), torch.cos(X))
        with pytest.raises(ValueError, match="draws from torch's global generator"):
            ft.grad(ft.recompute(lambda x: waits(x) + torch.rand(()), policy))(X)
    finally:
        asked.put("end")
        loader.join()


@pytest.mark.parametrize("policy", ["every", 1.5, -0.1, True, None, ("a", 3), ["a"]])
def test_another_policy_is_an_error(policy: Any) -> None:
    for make in (ft.recompute, lambda fn, policy: ft.recompute_layers(fn, policy=policy)):
        with pytest.raises(ValueError, match="recompute: expected the policy 'nothing', 'dots', a tuple of names"):
            make(mlp, policy)


def test_an_argument_to_offload_is_there() -> None:
    with pytest.raises(ValueError, match=r"recompute: offload=\(2,\): came 2 arguments by position"):
        ft.grad(summed)(P, X, ft.recompute(mlp, offload=2))


def loss_in_stack(fn: Callable[..., Any]) -> Callable[..., Any]:
    def loss(params: Any, batch: Any, key: Any) -> ft.Loss:
        x = ft.nn.stack(fn, params, batch)
        return ft.Loss(torch.sum(x**2), torch.ones(()), {})

    return loss


# of 3 layers, the last two of one kind: products and tanh in the backward programs of layers
COMPILED: dict[Any, dict[str, int] | None] = {
    None: {"mm": 7, "tanh": 0},
    "nothing": {"mm": 11, "tanh": 2},
    "dots": {"mm": 7, "tanh": 2},
    ("tanh",): {"mm": 9, "tanh": 0},
    0.0: None,  # as the partitioner likes, but not everything
}


@pytest.mark.parametrize("policy", COMPILED, ids=str)
def test_a_compiled_policy_keeps_what_it_says(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch)
    programs = lowered(monkeypatch)
    fn = mlp if policy is None else ft.recompute(mlp, policy)
    params = [ft.tree.map(lambda leaf: leaf.repeat(30, 30), P)] * 3
    x = X.repeat(1, 30)
    found = ft.compile(ft.value_and_grad(loss_in_stack(fn)))(params, x, KEY)
    # float64: products of 120 and 180 terms of about 1, in another order
    assert ft.tree.allclose(found, ft.value_and_grad(loss_in_stack(mlp))(params, x, KEY), rtol=1e-9, atol=1e-9)
    total = sum((program.operations for program in programs if program.which == "backward"), Counter())
    counts = COMPILED[policy]
    assert {name: total[name] for name in ("mm", "tanh")} == counts if counts else total["mm"] > 7


@pytest.mark.parametrize("policy", ["nothing", "dots", ("tanh",), 0.5], ids=str)
def test_without_layers_a_compiled_policy_keeps_what_it_says(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch)
    programs, seen = lowered(monkeypatch), []
    again = ft.recompute(mlp, policy)
    from functrain.compiler.inductor import lowering  # here: torch's compiler takes 2 s to load

    partition = lowering.partition
    monkeypatch.setattr(lowering, "partition", lambda *a, **k: seen.append(k["budget"]) or partition(*a, **k))
    found = ft.compile(ft.grad(lambda p, x: summed(p, x, again)))(P, X)
    # float64 rounding of fused kernels
    assert ft.tree.allclose(found, ft.grad(summed)(P, X, mlp), rtol=1e-12, atol=1e-12)
    (backward,) = [program.operations for program in programs if program.which == "backward"]
    # 3 and 4 products are its own, as x has no gradient
    expected = {"nothing": (7 + 4, 2), "dots": (7, 2), ("tanh",): (7 + 2, 0)}
    assert seen == [policy if policy == 0.5 else 1.0]
    if policy in expected:
        assert (backward["mm"], backward["tanh"]) == expected[policy]


@pytest.mark.parametrize("policy", ["nothing", 0.5, ("tanh",)], ids=str)
def test_in_a_compilation_of_ones_own_it_is_an_error(policy: Any) -> None:
    fn = torch.compile(lambda x: torch.sum(ft.recompute(mlp, policy)(P, x)), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="a torch.compile of your own cannot recompute; use ft.compile"):
        fn(X.clone().requires_grad_())


def test_of_two_parts_of_the_memory_in_one_loss_the_smaller_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch)
    seen: list[float] = []
    from functrain.compiler.inductor import lowering  # here: torch's compiler takes 2 s to load

    partition = lowering.partition
    monkeypatch.setattr(lowering, "partition", lambda *a, **k: seen.append(k["budget"]) or partition(*a, **k))
    half, quarter = ft.recompute(mlp, 0.5), ft.recompute(mlp, 0.25)
    ft.compile(ft.grad(lambda p, x: torch.sum(half(p, quarter(p, x)))))(P, X)
    ft.compile(ft.grad(lambda p, x: torch.sum(mlp(p, mlp(p, x)))))(P, X)
    assert seen == [0.25, 1.0], "and is not left for the next loss"


def test_what_waits_in_host_memory_is_an_error_where_it_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch)
    with pytest.raises(NotImplementedError, match="wait in host memory in eager only; leave out offload"):
        ft.compile(ft.grad(lambda p: torch.sum(ft.recompute(mlp, offload=1)(p, X))))(P)
