"""A tree in a few lines."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tree_cases import trees

import functrain as ft
from functrain import tree
from functrain.models import gpt2

law = settings(deadline=None, derandomize=True, max_examples=100)
CONFIG = gpt2.Config(vocab=304, context=24, layers=12, heads=2, width=8)


def rows(text: str) -> list[list[str]]:
    """The path, the elements, the size with its unit, and whether it is trainable, of each line below the header."""
    found = []
    for line in text.splitlines()[1:]:
        match = re.fullmatch(r"(.*?) +([\d,]+) +([\d.]+ k?[BMGT]?B?)  (.*?) *(yes|no|\d+ %)", line)
        assert match is not None, line
        found.append([match[1], match[2].replace(",", ""), match[3], match[4], match[5]])
    return found


@law
@given(trees(), st.integers(1, 4))
def test_the_lines_add_up_to_the_total_and_fit_a_terminal(t: Any, depth: int) -> None:
    text = tree.summary(t, depth=depth)
    *parts, total = rows(text)
    assert total[0] == "total" and int(total[1]) == tree.size(t) == sum(int(row[1]) for row in parts)
    assert max(map(len, text.splitlines())) <= 80
    ends = {re.match(r".*? [\d,]+(?=  )", line).end() for line in text.splitlines()[1:]}  # type: ignore[union-attr]
    assert len(ends) == 1, "numbers stand in line"


def test_the_blocks_of_a_model_share_a_line() -> None:
    params = gpt2.init(CONFIG, ft.random.key(0))
    assert tree.summary(params).splitlines() == [
        "path          parameters     size  dtype    trainable",
        "blocks/0..11      10,464  41.9 kB  float32  yes",
        "ln_f/bias              8     32 B  float32  yes",
        "ln_f/weight            8     32 B  float32  yes",
        "wpe                  192    768 B  float32  yes",
        "wte                2,432  9.73 kB  float32  yes",
        "total             13,104  52.4 kB  float32  yes",
    ]
    assert [row[0] for row in rows(tree.summary(params, depth=1))] == ["blocks", "ln_f", "wpe", "wte", "total"]
    assert "blocks/0..11/attn" in tree.summary(params, depth=3)


@pytest.mark.parametrize(
    ("third", "paths"),
    [
        (torch.ones(2), ["0..3"]),
        (torch.ones(3), ["0..1", "2", "3"]),
        (torch.ones(2, dtype=torch.float64), ["0..1", "2", "3"]),
        (0.5, ["0..1", "2", "3"]),
    ],
)
def test_only_blocks_that_are_alike_share_a_line(third: Any, paths: list[str]) -> None:
    blocks = [{"w": torch.ones(2)}, {"w": torch.ones(2)}, {"w": third}, {"w": torch.ones(2)}]
    assert [row[0] for row in rows(tree.summary(blocks, depth=1))] == [*paths, "total"]
    frozen = tree.summary(blocks, depth=1, trainable=["0/**", "1/**"])
    assert [row[0] for row in rows(frozen)][0] == "0..1"


def test_names_that_are_no_numbers_in_a_row_share_none() -> None:
    one = {"w": torch.ones(2)}
    assert [row[0] for row in rows(tree.summary({"0": one, "2": dict(one), "a": one, "b": one}, depth=1))][:-1] == [
        "0", "2", "a", "b",
    ]  # fmt: skip


def test_a_training_state_begins_with_its_params_which_are_trainable() -> None:
    optimizer = ft.optim.adamw(1e-3)
    state = ft.init_state(gpt2.init(CONFIG, ft.random.key(0)), optimizer, key=ft.random.key(0))
    found = {row[0]: row for row in rows(tree.summary(state))}
    assert list(found)[0] == "params/blocks" and list(found)[-2:] == ["total of params", "total"]
    assert [name for name, row in found.items() if row[4] == "yes"] == [
        "params/blocks", "params/ln_f", "params/wpe", "params/wte", "total of params",
    ]  # fmt: skip
    assert int(found["total of params"][1]) == tree.size(state.params) and found["total"][4] == "33 %"
    assert found["opt_state/0"][3] == "float32, int64"


def test_a_part_that_is_trainable_in_part_says_how_much() -> None:
    t = {"a": {"w": torch.ones(999), "b": torch.ones(1)}, "count": torch.tensor(3)}
    shares = {row[0]: row[4] for row in rows(tree.summary(t, depth=1, trainable="**/b"))}
    assert shares == {"a": "1 %", "count": "no", "total": "1 %"}
    with pytest.raises(tree.PathError, match="c: this pattern fits no path"):
        tree.summary(t, trainable="c")


def test_a_tied_tensor_counts_where_it_stands_first() -> None:
    shared = torch.ones(3)
    assert [row[1] for row in rows(tree.summary({"a": shared, "b": shared}))] == ["3", "0", "3"]
    state = {"average": shared, "params": {"w": shared}}
    assert [row[:2] for row in rows(tree.summary(state))] == [
        ["params/w", "3"], ["average", "0"], ["total of params", "3"], ["total", "3"],
    ]  # fmt: skip


def test_a_long_path_loses_its_middle() -> None:
    t = {"encoder" * 20: {"weight": torch.ones(2)}}
    line = tree.summary(t).splitlines()[1]
    assert len(line) <= 80 and re.match(r"encoder\S+\.\.\.\S+/weight +2 ", line)


@pytest.mark.parametrize(
    ("count", "said"),
    [(999, "999 B"), (1000, "1.00 kB"), (9994, "9.99 kB"), (9996, "10.0 kB"), (999499, "999 kB"), (999500, "1.00 MB"),
     (123_456_789, "123 MB"), (7 * 10**15, "7000 TB")],
)  # fmt: skip
def test_sizes_have_three_digits(count: int, said: str) -> None:
    t = torch.empty(count, dtype=torch.uint8, device="meta")
    assert rows(tree.summary([t]))[0][2] == said


@pytest.mark.parametrize(("depth", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_a_depth_that_cannot_be_is_named(depth: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="summary: expected .*depth"):
        tree.summary({}, depth=depth)


def test_the_empty_tree_and_a_single_tensor_have_a_summary() -> None:
    assert rows(tree.summary({})) == [["total", "0", "0 B", "", "no"]]
    assert [row[:2] for row in rows(tree.summary(torch.ones(3)))] == [["", "3"], ["total", "3"]]
