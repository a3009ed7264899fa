"""A list of calls holds a value until its last use, and no longer."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from functrain.compiler.listing import Listing


def test_a_result_is_gone_when_its_last_reader_lets_go_of_it() -> None:
    made: list[weakref.ref[Any]] = []
    alive: list[list[bool]] = []

    def two(values: list[Any]) -> list[Any]:
        values.clear()
        found = [torch.ones(2), torch.ones(3)]
        made.extend(weakref.ref(x) for x in found)
        return found

    def reading(values: list[Any]) -> list[Any]:
        values.clear()
        alive.append([ref() is not None for ref in made])
        return [torch.zeros(1)]

    listing = Listing(["x"])
    listing.add("two", two, ["x"], ["a", "b"])
    listing.add("reading", reading, ["a"], ["c"])
    listing.add("reading", reading, ["b", "c"], ["d"])
    listing.finish(["d"])([torch.ones(1)])
    assert alive == [[False, True], [False, False]]
