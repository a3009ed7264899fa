"""Collectives are linear functions of all ranks' tensors, under every transform."""

from __future__ import annotations

from typing import Any

import collective_cases
import pytest
import torch
from ranks import Ranks

import functrain as ft


@pytest.mark.parametrize("name", collective_cases.CASES)
def test_value_derivatives_and_maps_are_those_of_all_ranks_tensors(two: Ranks, name: str) -> None:
    expected = collective_cases.in_one_process(name)
    for row, found in zip(expected, two.run(collective_cases.on_ranks, name, False), strict=True):
        assert found.keys() == row.keys()
        for what, value in found.items():
            torch.testing.assert_close(value, row[what], msg=lambda text, what=what: f"{what}: {text}")


@pytest.mark.parametrize("name", ["gather last"])
def test_compiled_derivatives_are_too(two: Ranks, name: str) -> None:
    expected = collective_cases.in_one_process(name)
    for row, found in zip(expected, two.run(collective_cases.on_ranks, name, True), strict=True):
        for what, value in found.items():
            torch.testing.assert_close(value, row[what], msg=lambda text, what=what: f"{what}: {text}")


def test_on_one_rank_they_leave_a_tensor_as_it_is() -> None:
    plan, x = ft.sharding.Plan({"data": 1}, device="cpu"), torch.arange(4.0)
    with plan.entered():
        for fn in (ft.sharding.sum, ft.sharding.gather, ft.sharding.scatter, ft.sharding.shift, ft.sharding.exchange):
            assert torch.equal(fn(x, "data"), x)
        assert ft.sharding.index("data", x) == 0


def test_what_cannot_be_is_told() -> None:
    x: Any = torch.zeros(3)
    with pytest.raises(RuntimeError, match="inside of a step with a plan"):
        ft.sharding.sum(x, "data")
    with ft.sharding.Plan({"data": 1}, device="cpu").entered():
        with pytest.raises(ValueError, match="expected an axis of the mesh data=1, came 'model'"):
            ft.sharding.sum(x, "model")
        with pytest.raises(IndexError, match=r"a dimension of a tensor of shape \(3,\), came 1"):
            ft.sharding.gather(x, "data", 1)


def undivided() -> str:
    with ft.sharding.Plan({"data": 2}, device="cpu").entered():
        try:
            ft.sharding.scatter(torch.zeros(2, 3), "data", 1)
        except ValueError as error:
            return str(error)
    return ""


def test_what_does_not_divide_is_told(two: Ranks) -> None:
    for text in two.run(undivided):
        assert "expected a dimension that divides into 2 ranks, came 3 of (2, 3)" in text
