"""Batch norm of a rank's own rows, or synchronized: of the rows of all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks

import functrain as ft

X = ft.random.normal(ft.random.key(0), (18, 3, 2)).double()  # two batches of 9: of two ranks one has a row more


def trained(world: int, axes: Any, programs: str | None = None) -> Any:
    """Take two steps of a loss with a batch norm; return params, statistics and losses."""
    plan = ft.sharding.Plan({"data": world}, device="cpu") if world > 1 else None

    def loss_fn(params: Any, buffers: Any, batch: Any, key: Any) -> Any:
        y, stats = ft.nn.batch_norm(batch["x"] * params["times"], buffers, params["w"], params["b"], axes=axes)
        wrong = (y.sum((1, 2)) - batch["x"].amax((1, 2))) ** 2
        return ft.Loss(wrong.sum(), wrong.new_tensor(len(wrong)), {}), stats

    tx = ft.optim.sgd(0.05)
    step: Any = ft.train_step(loss_fn, tx, plan=plan, buffers=True)
    step = step if programs is None else ft.compile(step, cache=programs)
    ones = torch.ones(3, dtype=torch.float64)
    params = {"w": ones.clone(), "b": 0 * ones, "times": 1 + ft.random.normal(ft.random.key(1), (3, 2)).double()}
    stats = ft.tree.cast(ft.nn.batch_stats(3), torch.float64)
    state = ft.init_state(params, tx, key=ft.random.key(2), buffers=stats)
    batches = ft.data.batches({"x": X}, batch=9, shuffle=False)
    parts: Any = batches if plan is None else ft.data.shard(batches, plan=plan)
    losses = []
    for t in range(2):
        state, metrics = step(state, parts[t])
        losses.append(metrics["loss"].item())
    return state.params, state.buffers, torch.tensor(losses)


@pytest.mark.parametrize("compiled", [False, True])
def test_synchronized_it_is_that_of_all_rows(two: Ranks, tmp_path: Path, compiled: bool) -> None:
    whole = trained(1, None)
    for found in two.run(trained, 2, "data", str(tmp_path) if compiled else None):
        ft.testing.assert_trees_close(found, whole, rtol=1e-12, atol=1e-14)
    if not compiled:
        for found in two.run(trained, 2, None):
            with pytest.raises(AssertionError):
                ft.testing.assert_trees_close(found, whole, rtol=1e-3)


def test_it_equals_torchs_in_a_plan_of_one_rank_and_so_do_its_derivatives() -> None:
    stats, weight, bias = ft.nn.batch_stats(3), torch.linspace(0.5, 2, 3), torch.linspace(-1, 1, 3)
    x = X.float()

    def of(x: Any, weight: Any, bias: Any, axes: Any) -> torch.Tensor:
        y, _ = ft.nn.batch_norm(x, stats, weight, bias, axes=axes)
        return (y**3).sum()

    with ft.sharding.Plan({"data": 1}, device="cpu").entered():
        ours = ft.grad(of, argnums=(0, 1, 2))(x, weight, bias, "data")
        _, moved = ft.nn.batch_norm(x, stats, axes="data")
    ft.testing.assert_trees_close(ours, ft.grad(of, argnums=(0, 1, 2))(x, weight, bias, None), rtol=1e-4, atol=1e-5)
    ft.testing.assert_trees_close(moved, ft.nn.batch_norm(x, stats)[1], rtol=1e-5, atol=1e-7)


def test_axes_without_a_plan_are_told() -> None:
    with pytest.raises(RuntimeError, match="inside of a step with a plan"):
        ft.nn.batch_norm(torch.ones(2, 3), ft.nn.batch_stats(3), axes="data")
    with (
        ft.sharding.Plan({"data": 1}, device="cpu").entered(),
        pytest.raises(ValueError, match="expected an axis of the mesh data=1, came 'rows'"),
    ):
        ft.nn.batch_norm(torch.ones(2, 3), ft.nn.batch_stats(3), axes="rows")
