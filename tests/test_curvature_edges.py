"""Laws of curvature at its edges: mixed dtypes, sizes near the ends of float32, what is no vector or no tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import functrain as ft
from functrain import transforms, tree

WIDE = torch.float64


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE)


def outputs(params: Any, batch: Any, key: Tensor | None = None) -> Tensor:
    return torch.tanh(batch["x"] @ params["body"].to(WIDE)) @ params["head"].to(WIDE)  # (B,)


def of_outputs(z: Tensor, batch: Any) -> ft.Loss:
    return ft.Loss(torch.sum((z - batch["y"]) ** 2) / 2, z.new_full((), len(z)), {})


def loss_fn(params: Any, batch: Any, key: Tensor | None = None) -> ft.Loss:
    return of_outputs(outputs(params, batch), batch)


PARAMS = {"body": draw(0, 3, 4), "head": draw(1, 4)}
BATCH = {"x": draw(2, 6, 3), "y": draw(3, 6)}
V = {"body": draw(4, 3, 4), "head": draw(5, 4)}


def narrow(t: Any) -> Any:
    return {"body": t["body"].float(), "head": t["head"]}


@pytest.mark.parametrize("vector", ["mixed", "narrow", "wide"])
def test_params_of_two_dtypes_have_a_fisher_and_an_influence(vector: str) -> None:
    casts = {"mixed": narrow, "narrow": lambda t: tree.cast(t, torch.float32), "wide": lambda t: t}
    params, v = narrow(PARAMS), casts[vector](V)

    def found(params: Any, v: Any) -> tuple[Any, Tensor]:
        fisher = transforms.fisher_vp(loss_fn, params, BATCH, v)
        return fisher, transforms.influence(loss_fn, params, BATCH, v, steps=30, damping=50.0)

    fisher, influence = found(params, v)
    assert [leaf.dtype for leaf in tree.leaves(fisher)] == [torch.float32, WIDE]
    want = found(PARAMS, V)
    # float32 rounds params and v to 6e-8, in sums of some dozen
    torch.testing.assert_close(tree.leaves(tree.cast(fisher, WIDE)), tree.leaves(want[0]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(influence.to(WIDE), want[1], rtol=1e-5, atol=1e-6)
