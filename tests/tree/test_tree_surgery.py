"""At a path, and the leaves that a pattern chooses: laws, and what is said about a path that is not there."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tree_cases import Layer, Pair, assert_same, trees

from functrain import tree

law = settings(deadline=None, derandomize=True, max_examples=100)


@law
@given(trees())
def test_at_every_path_is_its_leaf(t):
    for path, leaf in tree.items(t):
        assert tree.at(t, path) is leaf
    assert tree.at(t, "") is t


@law
@given(trees())
def test_set_at_puts_there_and_nowhere_else(t):
    before = tree.items(t)
    for path, _ in before:
        new = object()
        after = tree.set_at(t, path, new)
        assert tree.at(after, path) is new
        expected = [new if other == path else leaf for other, leaf in before]
        assert all(a is b for a, b in zip(tree.leaves(after), expected, strict=True))
        assert tree.structure(after) == tree.structure(t)
        assert_same(tree.set_at(after, path, tree.at(t, path)), t, identical=True)
    assert all(a is b for (_, a), (_, b) in zip(tree.items(t), before, strict=True))


def test_subtrees_and_holes_can_be_replaced():
    t = {"a": Pair([1, 2], None), "b": OrderedDict(z=3, y=4)}
    assert tree.at(t, "a/x") == [1, 2] and tree.at(t, "a/y") is None
    assert tree.set_at(t, "a/y", {"w": 5}) == {"a": Pair([1, 2], {"w": 5}), "b": t["b"]}
    assert tree.set_at(t, "", 7) == 7
    assert list(tree.set_at(t, "b/y", 0).items())[1] == ("b", OrderedDict(z=3, y=0))
    assert tree.set_at(t, "b/y", 0)["a"] is not None and t["b"]["y"] == 4


ALL, NONE = (lambda path, leaf: True), (lambda path, leaf: False)
predicates = st.sampled_from([ALL, NONE, lambda path, leaf: leaf.dim() == 0, lambda path, leaf: "a" in path])


@law
@given(trees(), predicates)
def test_combine_undoes_partition(t, where):
    hit, miss = tree.partition(where, t)
    assert_same(tree.combine(hit, miss), t, identical=True)
    assert_same(tree.combine(miss, hit), t, identical=True)
    assert tree.paths(hit) == [path for path, leaf in tree.items(t) if where(path, leaf)]
    assert tree.paths(miss) == [path for path, leaf in tree.items(t) if not where(path, leaf)]
    assert tree.leaves(tree.mask(where, t)) == [where(path, leaf) for path, leaf in tree.items(t)]


PARAMS: Any = {"wte": 0, "blocks": [{"attn": {"qkv": 1, "out": 2}, "ln": {"scale": 3}}, {"attn": {"qkv": 4}}]}


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (["blocks/*/attn/qkv"], [1, 4]),
        (["**/qkv"], [1, 4]),
        (["blocks/**"], [2, 1, 3, 4]),
        (["blocks/0/*/*"], [2, 1, 3]),
        (["*"], [0]),
        (["w?e"], [0]),
        (["blocks/?/ln/scale", "wte"], [3, 0]),
        (["**"], [2, 1, 3, 4, 0]),
        ([], []),
    ],
)
def test_patterns_fit_paths(patterns, found):
    chosen = tree.select(PARAMS, *patterns)
    assert list(chosen.values()) == found
    assert all(tree.at(PARAMS, path) == leaf for path, leaf in chosen.items())
    assert tree.leaves(tree.partition(patterns, PARAMS)[0]) == found
    if len(patterns) == 1:
        assert tree.mask(patterns[0], PARAMS) == tree.mask(patterns, PARAMS)


@law
@given(trees())
def test_every_path_fits_itself_unless_it_holds_a_wildcard(t):
    for path, leaf in tree.items(t):
        assert tree.select(t, path)[path] is leaf
        if "*" not in path:
            assert list(tree.select(t, path)) == [path]


def test_signs_of_regular_expressions_are_plain_characters():
    assert list(tree.select({"a.b": 1, "axb": 2, "a\nb": 3, "[a]": 4}, "a.b")) == ["a.b"]
    assert list(tree.select({"a.b": 1, "a\nb": 3, "[a]": 4}, "a*")) == ["a\nb", "a.b"]
    assert list(tree.select({"a.b": 1, "[a]": 4}, "[a]")) == ["[a]"]
    assert list(tree.select({"a\nb": [3]}, "**")) == ["a\nb/0"]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("blocks/0/atn/qkv", "blocks/0/atn/qkv: no 'atn' here; there is 'attn'"),
        ("blocks/2", "blocks/2: no '2' here; there is '0', '1'"),
        ("blocks/-1", "no '-1' here; there is '0', '1'"),
        ("wte/x", "wte/x: no 'x' here; a leaf is, end the path before it"),
        ("wte/", "no '' here"),
        ("/wte", "no '' here; there is 'blocks', 'wte'"),
        ("hole", "no 'hole' here"),
    ],
)
def test_a_path_that_is_not_there_says_what_is(path, says):
    for look in (tree.at, lambda t, p: tree.set_at(t, p, 1)):
        with pytest.raises(tree.PathError) as error:
            look(PARAMS, path)
        assert says in str(error.value) and isinstance(error.value, KeyError) and isinstance(error.value, ValueError)


def test_an_empty_node_and_a_path_that_is_no_str_say_so():
    with pytest.raises(KeyError, match="a/b: no 'b' here; there is nothing, this node is empty"):
        tree.at({"a": None}, "a/b")
    with pytest.raises(TypeError, match="expected a path such as 'blocks/0/w', came 0 of type int"):
        tree.at([1], 0)


def test_a_pattern_that_fits_nothing_says_what_is_near():
    for choose in (tree.select, lambda t, p: tree.mask(p, t), lambda t, p: tree.partition(["wte", p], t)):
        with pytest.raises(tree.PathError) as error:
            choose(PARAMS, "blocks/0/attn/qvk")
        assert str(error.value) == "blocks/0/attn/qvk: this pattern fits no path; there is 'blocks/0/attn/qkv'"


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ({"a": [1]}, {"a": [2]}, "combine: a/0: expected None in one of the trees"),
        ([torch.ones(2)], [torch.ones(2)], "came a tensor torch.float32 (2,) and a tensor torch.float32 (2,)"),
        ({"a": [None]}, {"a": (1,)}, "a: expected None in one of the trees or the same container in both, came a list"),
        ({"a": None}, {"b": 1}, "combine: the root: expected"),
        (Layer(None, 1, 0.0), Layer(1, None, 0.5), "the root: expected None in one of the trees or the same container"),
        ([1, None], [None], "the root"),
        (1, {"a": 1}, "came a int and a dict; tree.partition makes trees that fit"),
    ],
)
def test_combine_names_what_both_have(first, second, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        tree.combine(first, second)
