"""Functions of parts and the whole functions that they make: what `test_shard_map` runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import functrain as ft

P = ft.sharding.P


class Case(NamedTuple):
    local: Callable[..., Any]
    whole: Callable[..., Any]
    specs: list[P]
    out: Any
    shapes: list[tuple[int, ...]]


def ring(x: Tensor, w: Tensor) -> Tensor:
    """Multiply rows of x by all of w, whose rows go round the ranks."""
    total, size = torch.zeros(()), 4
    for _ in range(size):
        total = total + torch.tanh(x @ w.mT).sum(1)
        w = ft.sharding.shift(w, "a")
    return total


CASES = {
    "columns": Case(lambda x, w: x @ w, lambda x, w: x @ w, [P(), P(None, "a")], P(None, "a"), [(3, 4), (4, 8)]),
    "rows": Case(
        lambda x, w: ft.sharding.sum(x @ w, "a"), lambda x, w: x @ w, [P(None, "a"), P("a")], P(), [(3, 8), (8, 4)]
    ),
    "two results": Case(
        lambda x: (x.sin(), ft.sharding.sum((x**2).sum(), "a")), lambda x: (x.sin(), (x**2).sum()), [P("a")],
        (P("a"), P()), [(8, 2)],
    ),
    "whole": Case(lambda x, y: x * y.sin(), lambda x, y: x * y.sin(), [P(), P()], P(), [(3,), (3,)]),
    "gathered": Case(
        lambda x: x * ft.sharding.gather(x, "a").sum(0), lambda x: x * x.sum(0), [P("a")], P("a"), [(8, 2)]
    ),
    "ring": Case(ring, lambda x, w: torch.tanh(x @ w.mT).sum(1), [P("a"), P("a")], P("a"), [(8, 3), (4, 3)]),
    "exchange": Case(
        lambda x: ft.sharding.exchange(x, "a", 1, 0) ** 2, lambda x: x**2, [P("a")], P(None, "a"), [(4, 8)]
    ),
}  # fmt: skip


def compared(name: str) -> list[str]:
    """Return what differs from the whole function, in value, first and second derivative, mapped and forwards."""
    case = CASES[name]
    plan = ft.sharding.Plan({"a": 4}, device="cpu")
    mapped = ft.sharding.shard_map(case.local, plan, case.specs, case.out)
    keys = ft.random.split(ft.random.key(3), len(case.shapes)).unbind()
    args = tuple(ft.random.normal(key, shape, torch.float64) for key, shape in zip(keys, case.shapes, strict=True))
    places = tuple(range(len(args)))

    def summed(fn: Callable[..., Any]) -> Callable[..., Tensor]:
        def total(*args: Tensor) -> Tensor:
            found = fn(*args)
            leaves = found if isinstance(found, tuple) else (found,)
            return sum((x.cos().sum() for x in leaves), torch.zeros(()))

        return total

    def second(fn: Callable[..., Any]) -> Any:
        grads = ft.grad(summed(fn), argnums=places)
        return ft.grad(lambda *args: sum((g.sin().sum() for g in grads(*args)), torch.zeros(())), argnums=places)(*args)

    def lanes(fn: Callable[..., Any]) -> Any:
        return torch.func.vmap(fn)(*[torch.stack([x, 2 * x]) for x in args])

    def forwards(fn: Callable[..., Any]) -> Any:
        return torch.func.jvp(fn, args, tuple(x.cos() for x in args))

    wrong = []
    for what, of in {
        "value": lambda fn: fn(*args), "gradient": lambda fn: ft.grad(summed(fn), argnums=places)(*args),
        "second": second, "map": lanes, "forwards": forwards,
    }.items():  # fmt: skip
        for a, b in zip(ft.tree.leaves(of(mapped)), ft.tree.leaves(of(case.whole)), strict=True):
            if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-10, atol=1e-12):
                wrong.append(f"{what}: {a} {b}")
    return wrong


def refused() -> list[str]:
    plan, said = ft.sharding.Plan({"a": 4}, device="cpu"), []
    for work in (
        lambda: ft.sharding.shard_map(torch.sin, plan, [P("a")], P("a"))(torch.ones(6)),
        lambda: ft.sharding.shard_map(torch.sin, plan, [P("b")], P("a"))(torch.ones(8)),
        lambda: ft.sharding.shard_map(torch.sin, plan, [P("a"), P()], P("a"))(torch.ones(8)),
        lambda: ft.sharding.shard_map(lambda x: (x, x), plan, [P("a")], [P("a")])(torch.ones(8)),
    ):
        try:
            work()
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said
