"""Laws of `recompute`: policies inside of each other, and arguments that come out again or are written to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_recompute import PARAMS, X
from torch import Tensor

import functrain as ft


@pytest.mark.parametrize("outer", ["nothing", "dots", 0.3])
@pytest.mark.parametrize("inner", ["nothing", "dots", 0.3, ("name",)])
def test_policies_nest(inner: Any, outer: Any) -> None:
    w = PARAMS[0]["w"]

    def twice(fn: Any) -> Any:
        return lambda w, x: fn(w, fn(w, x))

    def fn(w: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x @ w)

    nested = ft.recompute(twice(ft.recompute(fn, inner)), outer)
    expected = ft.grad(lambda w: torch.sum(twice(fn)(w, X)))(w)
    assert torch.equal(ft.grad(lambda w: torch.sum(nested(w, X)))(w), expected)


@pytest.mark.parametrize("policy", ["nothing", "dots"])
def test_an_argument_may_be_a_result_and_must_not_be_written_to(policy: Any) -> None:
    passing = ft.recompute(lambda x: (x, x.T, torch.sin(x)), policy)
    found = ft.grad(lambda x: sum(torch.sum(y**3) for y in passing(x)))(X)
    torch.testing.assert_close(found, 6 * X**2 + 3 * torch.sin(X) ** 2 * torch.cos(X), rtol=1e-12, atol=1e-12)
    writing = ft.recompute(lambda x, count: torch.sum(x * count.add_(1)), policy)
    with pytest.raises(ValueError, match=r"writes into its argument, a tensor of shape \(\)"):
        ft.grad(writing)(X, torch.tensor(0))
