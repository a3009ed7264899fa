"""Calls of a module's function with other arguments, and tokens that are no rows of a table."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import functrain as ft

MODULE = torch.nn.Linear(3, 1)
F, X = ft.from_module(MODULE), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("args", "came"),
    [
        ((F.params, X), "fewer arguments"),
        ((F.params,), "fewer arguments"),
        ((X,), "fewer arguments"),
        ((F.params, F.buffers), "fewer arguments"),
        ((F.params, F.buffers, X), r"a key of shape \(2, 3\)"),
        ((F.params, F.buffers, 0, X), "a key int"),
        ((F.params, X, ft.random.key(0)), "a tensor in the place of buffers"),
    ],
)
def test_apply_says_what_it_takes(args: Any, came: str) -> None:
    with pytest.raises(
        TypeError, match=rf"expected apply\(params, buffers, key, \*inputs of Linear\), came .*{came}.*pass"
    ):
        F.apply(*args)
    assert torch.equal(F.apply(F.params, F.buffers, None, X)[0], MODULE(X))
    assert torch.equal(F.apply(F.params, buffers=F.buffers, key=None, input=X)[0], MODULE(X))


def test_what_is_no_module_is_told() -> None:
    for given, came in ((torch.nn.Linear, "the class Linear"), (lambda x: x, "function"), (F.params, "dict")):
        with pytest.raises(TypeError, match=f"from_module: expected a torch.nn.Module, came {came}"):
            ft.from_module(given)  # type: ignore[arg-type]


@pytest.mark.parametrize("token", [4, -1, -100])
def test_a_token_outside_of_the_vocabulary_is_named(token: int) -> None:
    tokens, table = torch.tensor([[0, token]]), torch.ones(4, 2)
    with pytest.raises(IndexError, match=rf"embedding: expected tokens in \[0, 4\), .* came {token};"):
        ft.nn.embedding(tokens, table)
    with pytest.raises(IndexError, match=rf"embedding: expected tokens in \[0, 4\), .* came {token};"):
        ft.grad(lambda w: ft.nn.embedding(tokens, w).sum())(table)
    with pytest.raises(IndexError, match=r"expected tokens in \[0, 4\)"):
        ft.vmap(lambda t: ft.nn.embedding(t, table))(tokens)
    module = ft.from_module(torch.nn.Embedding(4, 2))
    with pytest.raises(IndexError, match=rf"from_module: expected tokens in \[0, 4\), .* came {token};"):
        module.apply(module.params, module.buffers, None, tokens)
    with pytest.raises(TypeError, match="embedding: expected integer tokens, came torch.float32; pass tokens.long"):
        ft.nn.embedding(tokens.float(), table)
