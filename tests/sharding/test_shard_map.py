"""A function of parts is the whole function, in value and in derivatives."""

from __future__ import annotations

import mapped
import pytest
from ranks import Ranks


@pytest.mark.parametrize("name", mapped.CASES)
def test_a_function_of_parts_is_the_whole_one(four: Ranks, name: str) -> None:
    assert four.run(mapped.compared, name) == [[]] * 4


def test_what_does_not_fit_is_told(four: Ranks) -> None:
    for divides, axis, arguments, results in four.run(mapped.refused):
        assert "argument 0: expected dimension 0 of (6,) to divide by 4, the ranks along a, for P('a')" in divides
        assert "expected an axis of the mesh a=4, came 'b'" in axis
        assert "expected 2 arguments, a spec for each, came 1" in arguments
        assert "expected 1 results, a spec for each, came 2" in results
