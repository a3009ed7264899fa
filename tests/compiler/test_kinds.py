"""What is done to leaves of one kind is looked at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

import functrain as ft
from functrain.compiler import graph_passes, tracing
from functrain.compiler.compilation import interpret
from functrain.compiler.recording import Recording

LEAVES = {
    **{f"a{i}": torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)},
    **{f"b{i}": torch.randn(4, 3, generator=torch.Generator().manual_seed(i)).T for i in range(2)},  # other strides
    **{f"c{i}": torch.randn(6, generator=torch.Generator().manual_seed(i)) for i in range(2)},
    "half": torch.ones(6, dtype=torch.bfloat16),
    "number": torch.tensor(2.0),
    **{f"int{i}": torch.arange(6) + i for i in range(2)},
}
KINDS = 6
aten = torch.ops.aten


def same(a: Any, b: Any) -> None:
    ft.tree.check_same_structure(a, b)
    for (path, x), y in zip(ft.tree.items(a), ft.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y), path


def halved(x: Tensor) -> Tensor:
    made = x * 2
    made.mul_(3)  # in memory of its own
    return made


def largest(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.max(x, 0) if x.dim() else (x, x.long())


def parts(x: Tensor) -> Tensor:
    first, *others = torch.split(x, 2) if x.dim() else (x,)
    return first + sum(other.sum() for other in others)


FUNCTIONS: dict[str, Any] = {
    "itself": lambda x: x,
    "a view": lambda x: x.mT if x.dim() == 2 else x.view(-1),
    "a view and what is written to": lambda x: x.unsqueeze(0).clone().add_(1),
    "written in place": halved,
    "several results": largest,
    "a split": parts,
    "a constant": lambda x: x + torch.tensor(3),
    "made from nothing": lambda x: torch.full_like(x, 2) * torch.arange(6).sum(),
    "closed over": lambda x: x * LEAVES["number"] + LEAVES["a0"].sum(),
    "nothing of x": lambda x: LEAVES["c0"].exp(),
    "a number beside it": lambda x: {"x": x + 1, "name": 3},
    "detached": lambda x: x.detach() * 2,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_that_runs_once_a_kind_gives_the_bits_that_it_gives_for_each_leaf(name: str) -> None:
    fn = FUNCTIONS[name]
    runs: list[Any] = []

    def counted(x: Tensor) -> Any:
        runs.append(x.shape)
        return fn(x)

    def mapped(leaves: Any) -> Any:
        return ft.tree.map(counted, leaves, by_kind=True)

    expected = mapped(LEAVES)
    assert len(runs) == len(LEAVES), "in eager it runs for each leaf"
    runs.clear()
    made = interpret(mapped)(LEAVES)
    assert len(runs) == KINDS
    same(ft.tree.map(lambda x: torch.as_tensor(x), made), ft.tree.map(lambda x: torch.as_tensor(x), expected))


def test_compiled_it_is_the_same() -> None:
    def mapped(leaves: Any) -> Any:
        return [ft.tree.map(fn, leaves, by_kind=True) for fn in FUNCTIONS.values()]

    leaves = {name: LEAVES[name] for name in ("a0", "a1", "c0", "c1")}
    made, expected = ft.compile(mapped)(leaves), mapped(leaves)
    for a, b in zip(made, expected, strict=True):
        assert ft.tree.allclose(a, b, rtol=1e-6, atol=1e-6)


def test_a_leaf_that_the_function_closes_over_is_that_leaf() -> None:
    def relative(leaves: list[Tensor]) -> list[Tensor]:
        return ft.tree.map(lambda x: x - leaves[0], leaves, by_kind=True)

    leaves = [torch.tensor([float(i), 1.0]) for i in range(3)]
    same(interpret(relative)(leaves), relative(leaves))


def test_leaves_of_a_row_that_are_one_tensor_are_another_kind() -> None:
    def squares(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
        return ft.tree.map(lambda x, y: x if x is y else x * y, a, [a[0], b[1], a[2], b[2]], by_kind=True)

    a, b = ([torch.tensor([float(i + j)]) for i in range(4)] for j in (2, 7))
    same(interpret(squares)(a, b), squares(a, b))


def test_what_is_written_in_place_later_is_followed() -> None:
    def written(leaves: list[Tensor]) -> list[Tensor]:
        views = ft.tree.map(lambda x: (x * 1).view(-1)[:1], leaves, by_kind=True)
        owners = ft.tree.map(lambda x: x * 1, leaves, by_kind=True)
        firsts = ft.tree.map(lambda x: x.view(-1)[:1], owners, by_kind=True)
        for x in views + firsts:
            x.add_(5)
        return [*views, *owners]

    leaves = [torch.randn(2, 2, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    same(interpret(written)(leaves), written(leaves))


@pytest.mark.parametrize("around", ["grad", "vmap", "vmap of grad", "jvp", "autograd"])
def test_under_transforms_every_leaf_is_looked_at(around: str) -> None:
    def size(leaves: list[Tensor]) -> Tensor:
        return sum(ft.tree.map(lambda x: (x.sin() * x).sum(), leaves, by_kind=True))  # type: ignore[return-value]

    def by_autograd(leaves: list[Tensor]) -> Any:
        with torch.enable_grad():
            given = [x.detach().requires_grad_() for x in leaves]
            return torch.autograd.grad(size(given), given)

    transformed: Any = {
        "grad": ft.grad(size),
        "vmap": torch.func.vmap(size),
        "vmap of grad": torch.func.vmap(torch.func.grad(size)),
        "jvp": lambda leaves: torch.func.jvp(size, (leaves,), (leaves,)),
        "autograd": by_autograd,
    }[around]
    leaves = [torch.randn(2, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    assert ft.tree.allclose(interpret(transformed)(leaves), transformed(leaves), rtol=1e-6, atol=1e-6)


def test_the_operations_that_are_run_do_not_grow_with_the_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = 0
    record = Recording._record

    def counted(*args: Any) -> None:
        nonlocal ran
        ran += 1
        record(*args)

    monkeypatch.setattr(Recording, "_record", counted)
    tx = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(1e-3))

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return ft.optim.apply_updates(params, updates), state

    def operations(count: int) -> int:
        nonlocal ran
        ran = 0
        params = {f"{i}": {"w": torch.ones(3, 3), "b": torch.ones(3)} for i in range(count)}
        interpret(step)(params, tx.init(params), params)
        return ran

    few, many = operations(2), operations(20)
    assert many == few


OPERATIONS = st.sampled_from(
    [torch.sin, torch.abs, torch.clone, lambda x: x * 2, lambda x: x.mT.mT if x.dim() > 1 else x, lambda x: x + x.sum(),
     lambda x: x.flatten().view(x.shape), lambda x: torch.where(x > 0, x, -x), lambda x: x.expand(2, *x.shape)[1],
     lambda x: x - x.amax(), lambda x: torch.stack([x, -x]).sum(0), lambda x: x.contiguous()]
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(functions=st.lists(st.lists(OPERATIONS, max_size=4), min_size=1, max_size=3))
def test_drawn_functions_one_after_another_give_the_same_bits(functions: list[list[Any]]) -> None:
    def run(leaves: Any) -> Any:
        for operations in functions:

            def fn(x: Tensor, operations: list[Any] = operations) -> Tensor:
                for operation in operations:
                    x = operation(x)
                return x

            leaves = ft.tree.map(fn, leaves, by_kind=True)
        return leaves

    leaves = {name: leaf for name, leaf in LEAVES.items() if leaf.dtype == torch.float32}
    same(interpret(run)(leaves), run(leaves))


def test_what_is_no_tensor_makes_another_kind() -> None:
    def scaled(leaves: list[Tensor]) -> list[Tensor]:
        return ft.tree.map(lambda x, n: x * n, leaves, [2, 3, 2.5, True, 0.0, -0.0], by_kind=True)

    leaves = [torch.arange(3) + i for i in range(6)]
    found, expected = interpret(scaled)(leaves), scaled(leaves)
    same(found, expected)
    assert [x.signbit().tolist() for x in found] == [x.signbit().tolist() for x in expected]


@pytest.mark.parametrize("around", ["vmap", "grad"])
def test_what_is_transformed_may_be_closed_over_alone(around: str) -> None:
    leaves = [torch.randn(2, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]

    def scaled(leaves: list[Tensor], scales: Tensor) -> Any:
        if around == "vmap":
            return torch.func.vmap(lambda s: ft.tree.map(lambda x: x * s, leaves, by_kind=True))(scales)
        return torch.func.grad(lambda s: sum(ft.tree.map(lambda x: (x * s.sum()).sum(), leaves, by_kind=True)))(scales)

    scales = torch.tensor([1.0, -2.0])
    assert ft.tree.allclose(interpret(scaled)(leaves, scales), scaled(leaves, scales))


def test_a_mode_of_the_users_sees_every_leaf() -> None:
    class Counting(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen += func is torch.ops.aten.sin.default
            return func(*args, **(kwargs or {}))

    counting = Counting()

    def fn(leaves: list[Tensor]) -> list[Tensor]:
        with counting:
            return ft.tree.map(torch.sin, leaves, by_kind=True)

    leaves = [torch.ones(2)] * 3
    same(interpret(fn)(leaves), [torch.sin(x) for x in leaves])
    assert counting.seen == 3


def once(fn: Any, *tensors: Tensor) -> fx.Graph:
    traced = tracing.trace(lambda mode, *xs: (fn(*xs), []), tensors, decompose=False)
    return graph_passes.compute_once(traced.graph)


def count(graph: fx.Graph, target: Any) -> int:
    return len(graph.find_nodes(op="call_function", target=target))


def test_the_same_is_computed_once() -> None:
    graph = once(lambda x: [(x.sin() + 1) * (x.sin() + 1)], torch.ones(3))
    assert count(graph, aten.sin.default) == count(graph, aten.add.Tensor) == 1


def test_two_results_stay_two_tensors_and_so_do_those_they_are_views_of() -> None:
    graph = once(lambda x: [x.exp(), x.exp(), x.sin()[None], x.sin()[None]], torch.ones(3))
    assert count(graph, aten.exp.default) == count(graph, aten.sin.default) == 2


def test_numbers_of_two_signs_or_types_are_not_the_same() -> None:
    graph = once(lambda x: [x * 0.0 + x * -0.0 + (x + 1) / (x + 1.0)], torch.arange(3))
    assert count(graph, aten.mul.Tensor) == 2 and count(graph, aten.add.Tensor) == 4
