"""Where a gradient is zero, derivatives through its norm are numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import functrain as ft
from functrain import optim, tree

PARAMS = {"w": torch.ones(3, 4, dtype=torch.float64), "b": torch.ones(4, dtype=torch.float64)}


def test_the_norm_of_nothing_has_no_slope() -> None:
    assert torch.equal(ft.grad(tree.norm)(torch.zeros(3)), torch.zeros(3))
    along = torch.func.jvp(tree.norm, (torch.zeros(3),), (torch.ones(3),))
    assert [float(leaf) for leaf in along] == [0.0, 0.0]
    x = torch.tensor([3.0, 4.0])
    assert torch.equal(ft.grad(tree.norm)(x), x / 5)
    assert torch.isnan(tree.norm(torch.tensor(torch.nan))) and tree.norm(torch.tensor(-torch.inf)) == torch.inf


@pytest.mark.parametrize(
    "tx",
    [optim.clip_by_global_norm(0.5), optim.clip_by_block_rms(0.5), optim.adaptive_grad_clip(0.1)],
    ids=["global", "block", "adaptive"],
)
def test_a_gradient_of_zero_passes_a_clip_as_it_is(tx: Any) -> None:
    def total(grads: Any) -> Any:
        return tree.sum(tx.update(grads, tx.init(PARAMS), PARAMS)[0])

    slope = ft.grad(total)(tree.zeros_like(PARAMS))
    assert all(torch.equal(leaf, torch.ones_like(leaf)) for leaf in tree.leaves(slope))


def test_where_nothing_is_clipped_the_limit_has_no_slope() -> None:
    def total(limit: Any) -> Any:
        tx = optim.clip_by_global_norm(limit)
        return tree.sum(tx.update(tree.zeros_like(PARAMS), tx.init(PARAMS))[0])

    assert ft.grad(total)(torch.tensor(0.5)) == 0.0


def test_a_limit_without_end_clips_nothing() -> None:
    tx = optim.clip_by_global_norm(torch.inf)
    assert all(tree.leaves(tree.map(torch.equal, tx.update(PARAMS, tx.init(PARAMS))[0], PARAMS)))


def test_an_example_without_a_gradient_passes_its_clip_as_it_is() -> None:
    rows = tree.map(lambda leaf: torch.stack([0 * leaf, 0.01 * leaf]), PARAMS)
    slope = ft.grad(lambda g: tree.sum(optim.per_example_global_norm_clip(g, 0.5)[0]))(rows)
    assert all(torch.equal(leaf, torch.ones_like(leaf)) for leaf in tree.leaves(slope))
    clipped, count = optim.per_example_global_norm_clip(rows, 0.01)
    torch.testing.assert_close(clipped["b"], rows["b"][1] / tree.norm(tree.map(lambda r: r[1], rows)) * 0.01)
    assert count == 1


@pytest.mark.parametrize("recompute", [False, True])
def test_an_unrolled_step_whose_gradient_is_zero_is_differentiated(recompute: bool) -> None:
    tx = optim.sgd(1.0)
    step = ft.train_step(lambda p, batch, key: torch.sum(p**2 * batch), tx)
    start = ft.init_state(torch.ones(2), tx, key=ft.random.key(0))

    def after(p: Any) -> Any:
        batches = [torch.full((2,), weight) for weight in (0.25, 0.0, 0.0)]
        return torch.sum(ft.unroll(step, start._replace(params=p), batches, recompute=recompute)[0].params)

    assert torch.equal(ft.grad(after)(torch.ones(2)), torch.full((2,), 0.5))
