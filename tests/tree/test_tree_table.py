"""How large a tree is, and the table that shows it."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from tree_cases import trees

from functrain import tree

law = settings(deadline=None, derandomize=True, max_examples=100)


@law
@given(trees())
def test_size_and_bytes_add_up(t):
    leaves = tree.leaves(t)
    assert tree.size(t) == sum(leaf.numel() for leaf in leaves)
    assert tree.bytes(t) == sum(leaf.numel() * leaf.element_size() for leaf in leaves)


def test_a_tied_tensor_counts_once_and_other_leaves_not_at_all():
    shared = torch.ones(3)
    t = {"a": shared, "b": [shared, torch.ones(2, dtype=torch.float64)], "c": 3, "d": None}
    assert tree.size(t) == 5 and tree.bytes(t) == 12 + 16


def test_the_table_shows_every_leaf():
    t = {
        "wte": torch.ones(256, 8),
        "blocks": [{"w": torch.ones((), dtype=torch.bfloat16)}],
        "count": torch.tensor(3),
        "name": "text",
        "rate": 0.5,
    }
    assert tree.format(t, trainable="**/w").splitlines() == [
        "path        shape           dtype     bytes  trainable",
        "blocks/0/w  ()              bfloat16      2  yes",
        "count       ()              int64         8  no",
        "name        'text'          str",
        "rate        0.5             float",
        "wte         (256, 8)        float32   8,192  no",
        "total       2,050 elements            8,202",
    ]


def test_a_leaf_with_a_long_text_stays_in_one_short_line():
    class Long:
        def __repr__(self) -> str:
            return "Long(\n" + "x" * 100 + ")"

    lines = tree.format([Long()]).splitlines()
    assert len(lines) == 3 and lines[1] == f"0      {'Long( ' + 'x' * 31}...  Long"


@law
@given(trees())
def test_columns_stand_in_line(t):
    lines = tree.format(t).splitlines()
    assert len(lines) == len(tree.leaves(t)) + 2
    right = lines[0].index("bytes") + len("bytes")
    for line, leaf in zip(lines[1:], tree.leaves(t), strict=False):
        assert line[:right].endswith(f"{leaf.numel() * leaf.element_size():,}")
        assert line[right:].strip() == ("yes" if leaf.is_floating_point() or leaf.is_complex() else "no")
    assert lines[-1].startswith("total") and lines[-1].endswith(f"{tree.bytes(t):,}")


def test_what_is_trainable_may_be_said_in_every_way_that_chooses_leaves():
    t = {"a": torch.ones(1), "b": torch.ones(1)}
    for where in ("a", ["a"], lambda path, leaf: path == "a"):
        assert [line.split()[-1] for line in tree.format(t, trainable=where).splitlines()[1:3]] == ["yes", "no"]
    with pytest.raises(tree.PathError, match=re.escape("c: this pattern fits no path; there is 'a', 'b'")):
        tree.format(t, trainable="c")


def test_the_empty_tree_has_an_empty_table():
    assert tree.format({}) == "path   shape       dtype  bytes  trainable\ntotal  0 elements             0"
