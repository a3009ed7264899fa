"""Batches that are dealt out to ranks: the numbers are those of all batches, with params whole or split."""

from __future__ import annotations

from typing import Any

import pytest
import steps
from ranks import Ranks


def evaluated(mesh: dict[str, int], count: int, options: dict[str, Any]) -> Any:
    return steps.evaluated(mesh, count, **options)


@pytest.mark.parametrize("axis", ["data", "fsdp"])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("options", [{}, {"as_list": False}])
def test_an_evaluation_is_that_of_one_process(two: Ranks, axis: str, count: int, options: dict[str, Any]) -> None:
    wanted, _ = evaluated({"data": 1}, count, options)
    found = two.run(evaluated, {axis: 2}, count, options)
    for means, _ in found:
        assert means == pytest.approx(wanted, rel=1e-12) and means == found[0][0]
    # each has its share of the batches, and no more
    assert [seen - 1 for _, seen in found] == [-(-count // 2), count // 2]


def test_a_compiled_one_too(two: Ranks) -> None:
    wanted, _ = evaluated({"data": 1}, 3, {})
    for means, _ in two.run(evaluated, {"fsdp": 2}, 3, {"compiled": True}):
        assert means == pytest.approx(wanted, rel=1e-12)
