"""Sums over rows, compiled for a CPU, are those of eager, and the same each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import functrain as ft
from functrain.compiler import tracing

INDEX = torch.tensor([[2, 0, -1], [2, 2, 1]])
ROW = torch.tensor([[1], [-2]])
ADDED: dict[str, Callable[[Tensor], Any]] = {
    "one index": lambda x: x[INDEX],
    "of a later dimension": lambda x: x[:, INDEX],
    "of the last": lambda x: x[..., INDEX],
    "two, that broadcast": lambda x: x[ROW, INDEX],
    "two of later dimensions": lambda x: x[:, ROW, INDEX],
    "two apart": lambda x: x[ROW, :, INDEX],
    "three": lambda x: x[ROW, INDEX, 1],
    "narrow": lambda x: x[INDEX.int()],
    "rows": lambda x: torch.index_select(x, 0, INDEX[0].abs()),
    "rows of a later dimension": lambda x: torch.index_select(x, -1, INDEX[0].abs()),
    "index_add": lambda x: torch.index_add(x, 1, INDEX[0].abs(), torch.sin(x)[:, :3], alpha=2),
    "index_put": lambda x: torch.index_put(x, (INDEX[0],), torch.cos(x[0]), accumulate=True),
    "a write": lambda x: x.clone().index_put_((INDEX[0],), torch.cos(x[0]), accumulate=True),
    "a write that replaces": lambda x: x.clone().index_put_((INDEX[0, :2],), torch.cos(x[0])),
    "take": lambda x: torch.take(x, INDEX),
    "gather": lambda x: torch.gather(x, 1, INDEX.abs()[:, :, None].expand(-1, -1, 4)),
}


@pytest.mark.parametrize("name", ADDED)
def test_what_is_added_is_what_eager_adds(name: str) -> None:
    x = torch.linspace(-1, 1, 3 * 4 * 4, dtype=torch.float64).view(3, 4, 4)
    fn = ft.grad(lambda x: torch.sum(torch.sin(ADDED[name](x)) ** 2))
    traced = tracing.trace(lambda mode, x: ([fn(x)], []), [x])
    found = fx.GraphModule({}, traced.graph)(x, *traced.lifted)[0]
    torch.testing.assert_close(found, fn(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 4), (3, 5), (3, 8)])
def test_an_index_outside_is_an_error_and_not_another_row(shape: tuple[int, ...]) -> None:
    put = ft.compile(lambda x, i, j: torch.index_put(x, (i, j), x.new_ones(2), accumulate=True))
    add = ft.compile(lambda x, i: torch.index_add(x, 0, i, x.new_ones(2, x.shape[1])))
    x, rows = torch.zeros(shape), torch.tensor([0, 1])
    for wrong in (shape[1], -shape[1] - 1):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds|indexing assertion"):
            put(x, rows, torch.tensor([1, wrong]))
    assert torch.equal(put(x, rows, torch.tensor([1, -1])).nonzero(), torch.tensor([[0, 1], [1, shape[1] - 1]]))
    with pytest.raises((IndexError, RuntimeError), match="out of bounds|indexing assertion"):
        add(x, torch.tensor([0, 3]))


def test_threads_add_in_the_same_order_each_time() -> None:
    rows = ft.random.randint(ft.random.key(0), (100_000,), 0, 50)
    weights = ft.random.normal(ft.random.key(1), (100_000, 8))
    lookups: list[Callable[[Tensor], Tensor]] = [
        lambda x: x[rows],
        lambda x: torch.index_select(x, 0, rows),
        lambda x: torch.gather(x, 0, rows[:, None].expand(-1, 8)),
        lambda x: torch.take(x, rows)[:, None],
        lambda x: F.embedding(rows, x),
    ]

    def loss(leaves: list[Tensor]) -> Tensor:
        looked_up = zip(lookups, leaves, strict=True)
        return torch.stack([torch.sum(torch.sin(f(x)) * weights) for f, x in looked_up]).sum()

    leaves = [ft.random.normal(ft.random.key(i), (50, 8)) for i in range(5)]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        grad = ft.compile(ft.grad(loss))
        first = grad(leaves)
        assert all(ft.tree.allclose(grad(leaves), first, rtol=0, atol=0) for _ in range(10))
    finally:
        torch.set_num_threads(threads)
    # float32 sums of 2000 numbers in another order
    assert ft.tree.allclose(first, ft.grad(loss)(leaves), rtol=1e-3, atol=1e-2)
