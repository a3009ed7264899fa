"""The test of `assert_no_leak`: a model that keeps documents apart, and mutants of it with one leak each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import functrain as ft
from functrain.compiler.compilation import interpret
from functrain.testing import assert_no_leak

VOCAB, WIDTH, CONTEXT = 32, 8, 20
FAULTS = {
    "no mask": "is not itself alone",
    "causal alone": "is not itself alone",
    "padding is seen": "is not itself alone",
    "positions of the row": "is not itself alone",
    "a mean over the row": "is not itself alone",
    "a mean over the batch": "is not itself alone",
    "a mask of a large number": "expected exactly 0.0",
    "a neighbour times nothing": "expected exactly 0.0",
}


def params(tied: bool) -> Any:
    draws = ft.random.split(ft.random.key(0), 4).unbind()
    shapes = {"wte": (VOCAB, WIDTH), "wpe": (CONTEXT, WIDTH), "qkv": (WIDTH, 3 * WIDTH), "head": (WIDTH, 5)}
    made = {name: ft.random.normal(key, shape) * 0.5 for (name, shape), key in zip(shapes.items(), draws, strict=True)}
    return {name: leaf for name, leaf in made.items() if not tied or name != "head"}


def model(fault: str = "") -> Any:
    """A layer of attention with residual, causal, of documents; with one fault."""

    def apply(params: Any, tokens: Tensor, *, documents: Tensor, positions: Tensor) -> Tensor:
        if fault == "positions of the row":
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        x = params["wte"][tokens] + params["wpe"][positions]  # (B, T, D)
        q, k, v = (x @ params["qkv"]).chunk(3, -1)
        scores = q @ k.mT / WIDTH**0.5  # (B, T, T)
        same = documents[:, :, None] == documents[:, None, :]
        if fault == "padding is seen":
            same = same | (documents[:, None, :] < 0)
        mask = torch.ones_like(same) if fault == "no mask" else same
        if fault == "causal alone":
            mask = torch.ones_like(same).tril()
        elif fault in ("", "a mask of a large number"):
            mask = mask.tril()
        hidden = -40.0 if fault == "a mask of a large number" else -torch.inf  # exp(-40) is 4e-18, no 0
        weights = torch.softmax(torch.where(mask, scores, hidden), -1)
        x = x + weights @ v
        if fault == "a mean over the row":
            x = x - x.mean(1, keepdim=True)
        if fault == "a mean over the batch":
            x = x - x.mean((0, 1), keepdim=True)
        if fault == "a neighbour times nothing":
            x = x + 1e-20 * x.roll(1, 1)
        return x @ (params["head"] if "head" in params else params["wte"].mT)

    return apply


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lengths", [(5, 2, 7, 1), (1, 1), (9, 9)])
def test_a_model_that_is_masked_by_documents_leaks_nothing(tied: bool, lengths: tuple[int, ...]) -> None:
    assert_no_leak(model(), params(tied), embedding="wte", lengths=lengths)
    assert_no_leak(model(), params(tied), embedding="wte", lengths=lengths, padding=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_each_leak_is_found(fault: str, tied: bool) -> None:
    with pytest.raises(AssertionError, match=FAULTS[fault]):
        assert_no_leak(model(fault), params(tied), embedding="wte")


def mapped(apply: Any) -> Any:
    """The model of one row, mapped over the rows."""

    def of_row(params: Any, *row: Tensor) -> Tensor:
        tokens, documents, positions = (x[None] for x in row)
        return apply(params, tokens, documents=documents, positions=positions)[0]

    of_rows = ft.vmap(of_row, in_dims=(None, 0, 0, 0))
    return lambda params, tokens, *, documents, positions: of_rows(params, tokens, documents, positions)


def positional(compiled: Any) -> Any:
    return lambda apply: compiled(
        lambda p, t, documents, positions: apply(p, t, documents=documents, positions=positions)
    )


WRAPPERS = {"compiled": positional(interpret), "recomputed": ft.recompute, "mapped": mapped}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_model_is_tested_as_it_is_called(wrapper: str) -> None:
    lengths = {"lengths": (3, 4)}  # each length is a program
    assert_no_leak(WRAPPERS[wrapper](model()), params(True), embedding="wte", **lengths)
    for fault in ("no mask", "a neighbour times nothing"):
        with pytest.raises(AssertionError, match=FAULTS[fault]):
            assert_no_leak(WRAPPERS[wrapper](model(fault)), params(True), embedding="wte", **lengths)


def test_a_model_that_is_compiled_is_compiled_with_its_gradient() -> None:
    compiled = positional(ft.compile)(model())
    assert_no_leak(compiled, params(False), embedding="wte", lengths=(2, 2), padding=1)
    assert len(compiled.programs) == 2  # of both rows, and of a document alone
    with pytest.raises(TypeError, match="came documents, positions, which the function takes by keyword only"):
        assert_no_leak(ft.compile(model()), params(False), embedding="wte")


def test_rows_of_packed_are_what_such_a_model_takes() -> None:
    batch = ft.data.packed([[5, 6, 7], [8, 9], [3, 4]], batch=2, context=8, seed=0, end=1)[0]
    logits = model()(params(True), batch["tokens"], documents=batch["documents"], positions=batch["positions"])
    alone = torch.tensor([[1, 5, 6, 7]]), torch.zeros(1, 4, dtype=torch.int64), torch.arange(4)[None]
    expected = model()(params(True), alone[0], documents=alone[1], positions=alone[2])
    assert torch.allclose(logits[batch["documents"] == 0], expected[0], atol=1e-5)  # sums of 8 terms below 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding": "no"}, "expected embedding='no' to be the path of a table .* came none of head, qkv, wpe, wte"),
        ({"embedding": "head"}, r"of 9 or more, came \(8, 5\)"),
        ({"lengths": (3,)}, "two documents of 1 token or more"),
        ({"lengths": (3, 0)}, "two documents of 1 token or more"),
        ({"apply": lambda params, tokens, **_: (params["wte"][tokens], None)}, "came tuple; wrap it"),
        ({"apply": lambda params, tokens, **_: params["wte"][tokens].mean(1)}, r"came \(2, 8\)"),
        ({"apply": lambda params, tokens, **_: torch.ones(*tokens.shape, 3)}, "came a gradient of 0; name"),
    ],
)
def test_wrong_arguments_are_errors(change: Any, message: str) -> None:
    arguments: Any = {"apply": model(), "params": params(False), "embedding": "wte"} | change
    with pytest.raises(ValueError, match=message):
        assert_no_leak(arguments.pop("apply"), arguments.pop("params"), **arguments)
