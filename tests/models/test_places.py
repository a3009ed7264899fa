"""Logits of some places: those of all places, there, in value and gradient; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import functrain as ft
from functrain import random, tree
from functrain.models import bert, modernbert

SHAPE: dict[str, Any] = {"vocab": 32, "context": 12, "layers": 1, "heads": 2, "width": 8, "inner": 8}
TOKENS = torch.arange(24).reshape(2, 12)
PLACES = torch.tensor([[1, 4, 11], [0, 7, 0]])
CASES: list[tuple[Any, Any]] = [
    (bert, bert.Config(**SHAPE)), (bert, bert.Config(**SHAPE, head="masked_lm")),
    (modernbert, modernbert.Config(**SHAPE)),
]  # fmt: skip


def logits_of(found: Any) -> torch.Tensor:
    return found.tokens if isinstance(found, bert.Predictions) else found  # type: ignore[no-any-return]


@pytest.mark.parametrize(("model", "config"), CASES, ids=["pretraining", "masked_lm", "modernbert"])
def test_logits_at_places_are_those_of_all_places_there(model: Any, config: Any) -> None:
    params = tree.map(lambda x: (3 * x + 0.1).double(), model.init(config, random.key(0)))
    key = random.key(1)

    def whole(params: Any) -> torch.Tensor:
        return torch.take_along_dim(logits_of(model.apply(params, TOKENS, config, key=key)), PLACES[..., None], 1)

    def some(params: Any) -> torch.Tensor:
        return logits_of(model.apply(params, TOKENS, config, places=PLACES, key=key))

    torch.testing.assert_close(some(params), whole(params), rtol=1e-12, atol=1e-12)
    left, right = (ft.grad(lambda params, fn=fn: fn(params).sin().sum())(params) for fn in (some, whole))
    for (path, a), (_, b) in zip(tree.items(left), tree.items(right), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=path)


@pytest.mark.parametrize(("model", "config"), CASES, ids=["pretraining", "masked_lm", "modernbert"])
def test_places_of_another_kind_are_refused(model: Any, config: Any) -> None:
    params, name = model.init(config, random.key(0)), model.__name__.rpartition(".")[2]
    for places, error, told in (
        (PLACES.int(), TypeError, rf"{name}: expected int64 places, came \(2, 3\) of torch.int32"),
        (PLACES[:1], ValueError, rf"{name}: expected places \(B, K\) with B = 2 as the tokens, came \(1, 3\)"),
        (PLACES[0], ValueError, rf"{name}: expected places \(B, K\)"),
        (PLACES + 1, IndexError, rf"{name}: expected places in \[0, 12\)"),
    ):
        with pytest.raises(error, match=told):
            model.apply(params, TOKENS, config, places=places)
    other = model.Config(**SHAPE, head="token", num_labels=2)
    with pytest.raises(ValueError, match=f"{name}: expected no places with a head that has no logits of tokens"):
        model.apply(model.init(other, random.key(0)), TOKENS, other, places=PLACES)
