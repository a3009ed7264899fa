"""A trace is the function: what it writes, what it takes from around it, and what it must not do. Run without a
compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import functrain as ft
from functrain.compiler.compilation import interpret
from functrain.testing import assert_max_traces

X = torch.arange(4.0)


def written_at_once(x: Tensor) -> Any:
    return (x * 2).add_(1).relu_().clamp_(max=3)


def written_through_a_view(x: Tensor) -> Any:
    z = torch.zeros(4)
    z[1:].copy_(x[:3])
    z[0] = x.sum()
    return z, z.view(2, 2).mT


def an_argument(x: Tensor) -> Any:
    before = x * 1
    x.add_(1)
    return before, x


def a_part_of_an_argument(x: Tensor) -> Any:
    x[:2].add_(x[2:])
    return x.sum()


def into_what_is_given(x: Tensor) -> Any:
    return torch.add(x, 1, out=torch.empty(4))


WRITES = [written_at_once, written_through_a_view, an_argument, a_part_of_an_argument, into_what_is_given]


@pytest.mark.parametrize("fn", WRITES)
def test_writes_are_those_of_eager(fn: Callable[[Tensor], Any]) -> None:
    mine, theirs = X.clone(), X.clone()
    expected, traced = fn(theirs), interpret(fn)
    found = traced(mine)
    for a, b in zip(ft.tree.leaves((found, mine)), ft.tree.leaves((expected, theirs)), strict=True):
        assert torch.equal(a, b)
    assert len(traced.programs) == 1


@pytest.mark.parametrize("fn", WRITES)
def test_a_function_that_writes_is_traced_once(fn: Callable[[Tensor], Any]) -> None:
    traced = interpret(assert_max_traces(1)(fn))
    for _ in range(2):
        traced(X.clone())


def test_a_tensor_from_around_a_function_is_read_at_every_call() -> None:
    around = torch.ones(4)
    traced = interpret(lambda x: x * around)
    assert torch.equal(traced(X), X)
    around.fill_(3.0)
    assert torch.equal(traced(X), 3 * X)


def test_a_number_in_the_code_can_be_read() -> None:
    def fn(x: Tensor) -> Tensor:
        return x[: int(torch.tensor(3))] * float(torch.tensor(2.0)) if torch.tensor(True) else x

    assert torch.equal(interpret(fn)(X), 2 * X[:3])


def _around(x: Tensor) -> Tensor:
    AROUND.add_(x)
    return x


AROUND = torch.ones(4)
MUST_NOT: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a write to a tensor from around it": (_around, "writes into a tensor that it did not get .* pass the tensor"),
    "random numbers of torch": (lambda x: x + torch.rand(4), r"test_tracing.py:\d+.*came aten.rand, .*ft.random"),
    "dropout of torch": (lambda x: torch.nn.functional.dropout(x), "random numbers from a key, came aten.bernoulli"),
}


@pytest.mark.parametrize("what", MUST_NOT)
def test_what_would_be_so_once_is_an_error(what: str) -> None:
    fn, says = MUST_NOT[what]
    with pytest.raises(TypeError, match=says):
        interpret(fn)(X)
    assert torch.equal(AROUND, torch.ones(4))


def test_what_a_trace_has_made_cannot_be_used_in_the_next() -> None:
    kept: list[Tensor] = []
    keep = interpret(lambda x: kept.append(x * 2) or x)
    assert torch.equal(keep(X), X)
    with pytest.raises(TypeError, match=r"a tensor of shape \(4,\) that was made while .* return it, in place of"):
        interpret(lambda x: x + kept[0])(X)
