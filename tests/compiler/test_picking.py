"""The gradient of picking an entry of each row: right, and without zeros as large as what is picked from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from memory import peak_bytes
from torch import Tensor, fx

import functrain as ft
from functrain.compiler import picking, tracing

X = torch.linspace(-1, 1, 3 * 4 * 5, dtype=torch.float64).view(3, 4, 5)
LAST, FIRST = torch.tensor([[0, 4, 2, 1], [1, 1, 3, 0], [4, 4, 4, 4]]), torch.tensor([[2, 0, 1, 1, 0]])
PICKED: dict[str, Callable[[Tensor], Tensor]] = {
    "of the last dimension": lambda x: x.gather(-1, LAST[..., None]),
    "of the first": lambda x: x[:, 0].gather(0, FIRST),
    "of the middle": lambda x: x.gather(1, LAST[:, None, :1].expand(3, 1, 5) % 4),
    "several of a row": lambda x: x.gather(2, LAST[:, :, None].expand(3, 4, 2)),
    "of a part of the rows": lambda x: x.gather(2, LAST[:, :2, None]),
    "twice": lambda x: x.gather(2, LAST[..., None]) * x.gather(2, (4 - LAST)[..., None]),
    "of a loss": lambda x: ft.losses.softmax_cross_entropy_with_integer_labels(x, LAST),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKED)
@pytest.mark.parametrize("twice", [False, True])
def test_the_gradient_is_that_of_eager(name: str, twice: bool) -> None:
    def once(x: Tensor) -> Tensor:
        return torch.sum(torch.sin(PICKED[name](x)) ** 2)

    fn: Any = ft.grad(lambda x: torch.sum(ft.grad(once)(x) ** 2)) if twice else ft.grad(once)
    traced = tracing.trace(lambda mode, x: ([fn(x)], []), [X])
    picking.by_comparison(traced.graph)
    found = fx.GraphModule({}, traced.graph)(X, *traced.lifted)[0]
    torch.testing.assert_close(found, fn(X), rtol=1e-12, atol=1e-12)
    one_a_row = name not in ("several of a row", "of a part of the rows")
    scatters = [node for node in traced.graph.nodes if "scatter_add" in str(node.target)]
    assert bool(scatters) != one_a_row


def test_what_nobody_gathers_is_scattered_as_it_was() -> None:
    traced = tracing.trace(lambda mode, x: ([torch.zeros_like(x).scatter_add(2, LAST[..., None], x[..., :1])], []), [X])
    before = [node.target for node in traced.graph.nodes]
    picking.by_comparison(traced.graph)
    assert [node.target for node in traced.graph.nodes] == before


def test_a_classifiers_compiled_gradient_holds_nothing_as_large_beside_it() -> None:
    x, labels = torch.randn(64, 4096), torch.arange(64) * 7
    step = ft.compile(ft.value_and_grad(lambda x, labels: ft.losses.classification(x, labels)))
    loss, grad = step(x, labels)
    expected, gradient = ft.value_and_grad(lambda x: ft.losses.classification(x, labels))(x)
    torch.testing.assert_close((loss.total, grad), (expected.total, gradient))
    assert peak_bytes(lambda: step(x, labels)) <= 1.1 * x.nbytes
    labels[3] = 4096
    with pytest.raises(IndexError, match="expected each index"):
        step(x, labels)
