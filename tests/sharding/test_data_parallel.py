"""Ranks with rows of their own take the step of the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import steps
import torch
from ranks import Ranks

import functrain as ft


def assert_equal(found: list[Any], expected: Any, *, skip: tuple[str, ...] = ()) -> None:
    """Check states and metrics of all ranks against those of one process."""
    state, seen = expected
    for of_rank, seen_by_rank in found:
        for (path, a), b in zip(ft.tree.items(of_rank), ft.tree.leaves(state), strict=True):
            if not path.startswith(skip):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13, msg=lambda text, path=path: f"{path}: {text}")
        for a, b in zip(seen_by_rank, seen, strict=True):
            assert a == pytest.approx(b, rel=1e-12, nan_ok=True)
    first, *others = found
    for other in others:  # bit for bit: else ranks drift apart
        assert all(map(torch.equal, ft.tree.leaves(first[0]), ft.tree.leaves(other[0])))
        assert repr(first[1]) == repr(other[1])  # NaN is NaN


@pytest.mark.parametrize(("accumulate", "rows"), [(1, 12), (2, 12), (1, 7), (3, 7)])
def test_ranks_times_slices_are_slices(two: Ranks, accumulate: int, rows: int) -> None:
    found = two.run(steps.train, 2, accumulate, False, False, None, rows)
    assert_equal(found, steps.train(1, 2 * accumulate, rows=rows))


def test_without_dropout_it_is_the_whole_batch(two: Ranks) -> None:
    found = two.run(steps.train_plain, 2)
    assert_equal(found, steps.train_plain(1))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_all_ranks_skip_a_step_that_one_of_them_spoils(two: Ranks, accumulate: int) -> None:
    found = two.run(steps.train, 2, accumulate, True, False, 1)
    expected = steps.train(1, 2 * accumulate, True, False, 1)
    assert [row["skipped"] for row in expected[1]] == [0.0, 1.0, 0.0]
    assert_equal(found, expected)


def test_compiled_ranks_skip_the_same_step(two: Ranks, tmp_path: Path) -> None:
    found = two.run(steps.train, 2, 2, True, False, 1, 12, str(tmp_path))
    assert_equal(found, steps.train(1, 4, True, False, 1))


def test_buffers_are_the_mean_over_ranks(two: Ranks) -> None:
    found = two.run(steps.train, 2, 1, False, True)
    expected = steps.train(1, 2)  # the same params
    assert_equal([(state._replace(buffers=()), seen) for state, seen in found], expected)
    data, mean = steps.batches(), torch.zeros(steps.WIDTH).double()
    for t in range(3):
        mean = 0.9 * mean + 0.1 * data[t]["x"].mean(0)  # ranks have as many rows
    for state, _ in found:
        torch.testing.assert_close(state.buffers["mean"], mean)
        assert state.buffers["steps"] == 3


def compiled_by(folder: str) -> tuple[int, int]:
    """Return how many programs this rank has compiled, and how many it has loaded, for a step with split params."""
    from torch._dynamo.utils import counters

    counters.clear()
    steps.split({"fsdp": 2}, "mlp", programs=folder)
    return counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"]


def test_ranks_compile_once(two: Ranks, tmp_path: Path) -> None:
    """One compiles, the other loads what it has compiled; and both load it when they start again."""
    first = two.run(compiled_by, str(tmp_path))
    assert sorted(missed for missed, _ in first)[0] == 0 and max(missed for missed, _ in first) > 0
    assert all(missed == 0 and hit > 0 for missed, hit in two.run(compiled_by, str(tmp_path)))
