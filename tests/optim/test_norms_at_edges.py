"""Norms whose squares leave the dtype: nothing that is scaled by one becomes 0, infinite or NaN."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import functrain as ft
from functrain import optim, tree

EDGES = [0.0, 1e-30, 1e-25, 1e-3, 1.0, 1e20, 1e38]
REAL = [torch.float32, torch.float64]


def _update(transformation: Any, *leaves: Tensor) -> list[Tensor]:
    updates = list(leaves)
    return transformation.update(updates, transformation.init(updates), updates)[0]


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(dtype, size) for dtype in [*REAL, torch.bfloat16, torch.complex64, torch.complex128] for size in EDGES]
    + [(dtype, size) for dtype in [torch.float64, torch.complex128] for size in (1e-200, 1e200)],
)
def test_a_norm_is_that_of_exact_squares(dtype: torch.dtype, size: float) -> None:
    wide = torch.promote_types(dtype, torch.float32).to_real()
    leaves = [torch.tensor([size, -size / 3], dtype=dtype), torch.tensor(size / 7, dtype=dtype)]
    exact = math.hypot(*(abs(complex(x)) for leaf in leaves for x in leaf.flatten().tolist()))
    tolerance = 1e-6 if wide == torch.float32 else 1e-15
    assert tree.norm(leaves).item() == pytest.approx(exact, rel=tolerance, abs=0.0)
    alone = abs(complex(leaves[1]))
    for norm in (optim.safe_norm, optim.safe_root_mean_squares):
        assert norm(leaves[1], 0.0).item() == pytest.approx(alone, rel=8e-3 if dtype == torch.bfloat16 else tolerance)


@pytest.mark.parametrize("dtype", REAL)
def test_ordinary_norms_keep_their_bits(dtype: torch.dtype) -> None:
    x = ft.random.normal(ft.random.key(0), (1000,)).to(dtype)
    for size in (1e-6, 1.0, 1e3):
        plain = torch.sum((x * size) * (x * size))
        assert torch.equal(tree.norm([x * size]), torch.sqrt(plain))
        assert torch.equal(tree.norm([x * size], squared=True), plain)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_has_no_finite_norm(value: float) -> None:
    assert not tree.norm([torch.tensor([value, 1.0])]).isfinite()


@pytest.mark.parametrize("size", EDGES[:-1])
def test_a_norm_has_a_derivative(size: float) -> None:
    got = torch.func.grad(lambda x: tree.norm([x]))(torch.tensor([size, 0.0]))
    torch.testing.assert_close(got, torch.tensor([1.0 if size else 0.0, 0.0]))


@pytest.mark.parametrize("size", EDGES)
@pytest.mark.parametrize("dtype", REAL)
def test_transformations_that_divide_by_a_norm(size: float, dtype: torch.dtype) -> None:
    g = torch.tensor([size, size / 4], dtype=dtype)
    direction = torch.tensor([4.0, 1.0], dtype=dtype) / math.sqrt(17)
    clipped = min(1.0, size * math.sqrt(17) / 4)
    torch.testing.assert_close(_update(optim.clip_by_global_norm(1.0), g)[0], direction * clipped)
    torch.testing.assert_close(_update(optim.normalize(), g)[0], direction if size else 0 * g)
    rms = size * math.sqrt(17 / 32)
    torch.testing.assert_close(_update(optim.clip_by_block_rms(1.0), g)[0], g / max(rms, 1.0))
    one, _ = optim.per_example_global_norm_clip([g[None]], 1.0)
    torch.testing.assert_close(one[0], direction * clipped)
    assert all(x.isfinite().all() for x in _update(optim.scale_by_trust_ratio(), g))
    assert all(x.isfinite().all() for x in _update(optim.normalize_by_update_norm(), g))


def test_small_beside_large_stays() -> None:
    g = torch.tensor([1e20, 1.0])
    for clip in (optim.clip_by_global_norm(1.0), optim.adaptive_grad_clip(1e-20)):
        torch.testing.assert_close(_update(clip, g)[0], torch.tensor([1.0, 1e-20]), rtol=1e-5, atol=0.0)
    root = math.sqrt(2)
    torch.testing.assert_close(_update(optim.clip_by_block_rms(1.0), g)[0], torch.tensor([root, root * 1e-20]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_clipped_in_float32(dtype: torch.dtype) -> None:
    big, tiny = torch.tensor([300.0], dtype=dtype), torch.tensor([1e-4], dtype=dtype)
    for got, want in (
        (_update(optim.clip_by_block_rms(1.0), big), 1.0),
        (_update(optim.adaptive_grad_clip(0.1), big), 30.0),
        (_update(optim.clip_by_global_norm(1e-3), big), 1e-3),
        (_update(optim.normalize(), tiny), 1.0),
        (_update(optim.normalize_by_update_norm(eps=0.0), tiny), 1.0),
    ):
        assert got[0].dtype == dtype
        torch.testing.assert_close(got[0].float(), torch.tensor([want]), rtol=1e-2, atol=0.0)


def test_the_metric_of_a_step_is_finite() -> None:
    optimizer = optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(1.0))
    params = {"w": torch.zeros(2)}
    slope = torch.tensor([1e20, 1.0])
    for make in (lambda fn: fn, ft.compile):
        state = ft.init_state(params, optimizer, key=ft.random.key(0), guard=ft.train.skip_nonfinite())
        step = make(
            ft.train_step(
                lambda params, batch, key: torch.sum(params["w"] * batch), optimizer, guard=ft.train.skip_nonfinite()
            )
        )
        state, metrics = step(state, slope)
        assert metrics["grad_norm"].item() == pytest.approx(1e20) and metrics["skipped"] == 0
        torch.testing.assert_close(state.params["w"], torch.tensor([-1.0, -1e-20]))
