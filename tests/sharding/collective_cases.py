"""Each collective on ranks, and as a function of all ranks' tensors in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import functrain as ft

RANKS = 2
CASES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[list[Tensor]], list[Tensor]]]] = {
    "sum": (lambda x: ft.sharding.sum(x, "data"), lambda xs: [sum(xs, torch.zeros(()))] * len(xs)),
    "gather": (lambda x: ft.sharding.gather(x, "data"), lambda xs: [torch.cat(xs)] * len(xs)),
    "gather last": (lambda x: ft.sharding.gather(x, "data", -1), lambda xs: [torch.cat(xs, -1)] * len(xs)),
    "scatter": (lambda x: ft.sharding.scatter(x, "data"), lambda xs: [*sum(xs, torch.zeros(())).chunk(len(xs))]),
    "scatter 1": (
        lambda x: ft.sharding.scatter(x, "data", 1),
        lambda xs: [*sum(xs, torch.zeros(())).chunk(len(xs), 1)],
    ),
    "shift": (lambda x: ft.sharding.shift(x, "data"), lambda xs: [xs[i - 1] for i in range(len(xs))]),
    "shift back": (lambda x: ft.sharding.shift(x, "data", -1), lambda xs: [*xs[1:], xs[0]]),
    "exchange": (
        lambda x: ft.sharding.exchange(x, "data", 0, 1),
        lambda xs: [torch.cat([x.chunk(len(xs))[i] for x in xs], 1) for i in range(len(xs))],
    ),
    "exchange 0": (
        lambda x: ft.sharding.exchange(x, "data"),
        lambda xs: [torch.cat([x.chunk(len(xs))[i] for x in xs]) for i in range(len(xs))],
    ),
}  # fmt: skip


def tensors(name: str, count: int = 1) -> list[Tensor]:
    """Draw a tensor for each rank, `count` times."""
    key = ft.random.key(len(name))
    return [ft.random.normal(ft.random.fold_in(key, i), (count, 4, 6)).double().squeeze(0) for i in range(RANKS)]


def loss(y: Tensor, rank: int) -> Tensor:
    return (torch.sin(y * (rank + 1)) * y).sum()


def on_ranks(name: str, compiled: bool) -> dict[str, Tensor]:
    """Compute value, first and second derivatives, map and forward derivative of a collective on this rank."""
    plan = ft.sharding.Plan({"data": RANKS}, device="cpu")
    collective, rank = CASES[name][0], plan.rank
    x, v = tensors(name)[rank], tensors(name + "tangent")[rank]

    def value(x: Tensor) -> Tensor:
        with plan.entered():
            return loss(collective(x), rank)

    def along(x: Tensor) -> Tensor:
        return (ft.grad(value)(x) * v).sum()

    if compiled:
        return {"grad": ft.compile(ft.grad(value))(x), "second": ft.compile(ft.grad(along))(x)}
    with plan.entered():
        found = {"value": collective(x), "map": ft.vmap(collective)(tensors(name, 3)[rank])}
        found["map of grad"] = ft.vmap(ft.grad(value))(tensors(name, 3)[rank])
        found["tangent"] = torch.func.jvp(collective, (x,), (v,))[1]
    return found | {"grad": ft.grad(value)(x), "second": ft.grad(along)(x)}


def in_one_process(name: str) -> list[dict[str, Tensor]]:
    collective = CASES[name][1]
    xs = [x.requires_grad_() for x in tensors(name)]
    vs, many = tensors(name + "tangent"), tensors(name, 3)

    def total(xs: list[Tensor]) -> Tensor:
        return torch.stack([loss(y, rank) for rank, y in enumerate(collective(xs))]).sum()

    grads = torch.autograd.grad(total(xs), xs, create_graph=True)
    second = torch.autograd.grad(torch.stack([(g * v).sum() for g, v in zip(grads, vs, strict=True)]).sum(), xs)
    mapped = [collective([x[i] for x in many]) for i in range(3)]
    of_each = [torch.autograd.grad(total(ys), ys) for ys in [[x[i].requires_grad_() for x in many] for i in range(3)]]
    rows: list[dict[str, Any]] = []
    for rank in range(RANKS):
        rows.append({"value": collective(xs)[rank], "grad": grads[rank], "second": second[rank]})
        rows[-1] |= {"tangent": collective(vs)[rank], "map": torch.stack([m[rank] for m in mapped])}
        rows[-1]["map of grad"] = torch.stack([g[rank] for g in of_each])
    return [{key: value.detach() for key, value in row.items()} for row in rows]
