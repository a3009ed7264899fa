"""Trees: the laws of leaves, paths, structures and maps; every error names the path, what was expected and came."""

from __future__ import annotations

import time
from collections import OrderedDict, defaultdict, deque
from typing import Any

import optree
import pytest
import torch
from hypothesis import given, settings
from later import Later
from tree_cases import Layer, Pair, assert_same, below, compiled, tensors, trees

from functrain import tree

jax = Later("jax")

law = settings(deadline=None, derandomize=True, max_examples=100)
ONE = torch.ones(())


@law
@given(trees())
def test_unflatten_undoes_flatten(t):
    leaves, structure = tree.flatten(t)
    assert_same(tree.unflatten(structure, leaves), t, identical=True)
    assert_same(tree.unflatten(structure, iter(leaves)), t, identical=True)
    assert structure == tree.structure(t) and hash(structure) == hash(tree.structure(t))


@law
@given(trees())
def test_items_are_the_leaves_in_order_with_their_paths(t):
    leaves = tree.leaves(t)
    assert all(a is b for a, b in zip(leaves, tree.flatten(t)[0], strict=True))
    assert all(a is b for (_, a), b in zip(tree.items(t), leaves, strict=True))
    assert tree.paths(t) == [path for path, _ in tree.items(t)]
    assert len(set(tree.paths(t))) == len(leaves)


@law
@given(trees())
def test_paths_are_the_names_on_the_way(t):
    def walk(node: Any, path: str) -> dict[str, Any]:
        inside = below(node)
        if inside is None:
            return {path: node}
        found = {}
        for name, child in inside:
            found |= walk(child, f"{path}/{name}" if path else name)
        return found

    expected = walk(t, "")
    assert {path: id(leaf) for path, leaf in tree.items(t)} == {path: id(leaf) for path, leaf in expected.items()}


@law
@given(trees())
def test_children_are_in_the_order_of_the_leaves(t):
    pairs = tree.children(t)
    below_in_order = [t] if pairs is None else [leaf for _, child in pairs for leaf in tree.leaves(child)]
    assert all(a is b for a, b in zip(below_in_order, tree.leaves(t), strict=True))


jax.tree_util.register_dataclass(Layer, data_fields=["weight", "bias"], meta_fields=["rate"])


def _jax_sorts(node: Any) -> bool:
    """Tell whether JAX can order the keys everywhere: it refuses int beside str."""
    if isinstance(node, dict) and len({type(key) for key in node}) > 1:
        return False
    return all(_jax_sorts(child) for _, child in below(node) or [])


@law
@given(trees().filter(_jax_sorts))
def test_leaves_are_those_of_jax_in_its_order(t):
    assert all(a is b for a, b in zip(tree.leaves(t), jax.tree.leaves(t), strict=True))


def test_int_keys_come_before_str_keys():
    assert tree.paths({"b": ONE, 10: ONE, "1": ONE, 9: ONE}) == ["9", "10", "1", "b"]
    assert tree.leaves({"b": 3, 10: 1, "1": 2, 9: 0}) == [0, 1, 2, 3]


def test_an_ordered_dict_keeps_its_order_and_others_are_sorted():
    rows = [("b", 1), ("a", 2)]
    assert tree.paths(OrderedDict(rows)) == ["b", "a"] and tree.leaves(OrderedDict(rows)) == [1, 2]
    assert tree.paths(defaultdict(int, rows)) == ["a", "b"] and tree.leaves(defaultdict(int, rows)) == [2, 1]
    assert list(tree.map(lambda x: x, dict(rows))) == ["b", "a"]  # or torch.compile compiles again


def test_what_optree_knows_beyond_the_contract_has_paths_too():
    odd = {"d": deque([1, 2]), "max": torch.max(torch.ones(2), dim=0), "size": torch.Size([3]), "t": time.gmtime(0)}
    assert [leaf for _, leaf in tree.items(odd)] == tree.leaves(odd)
    assert tree.paths(odd)[:5] == ["d/0", "d/1", "max/0", "max/1", "size"]
    assert tree.at(tree.set_at(odd, "max/0", 5), "max/0") == 5

    class Rows(dict):
        """A subclass is a leaf: nobody knows how to build it again."""

    class Column(list):
        """So is this one."""

    for leaf in (Rows(a=1), Column([1])):
        assert tree.items([leaf]) == [("0", leaf)] and tree.leaves([leaf]) == [leaf]


def test_empty_trees_have_no_leaves():
    for empty in ({}, [], (), None, OrderedDict(), {"a": [None, {}]}):
        leaves, structure = tree.flatten(empty)
        assert leaves == tree.paths(empty) == tree.items(empty) == []
        assert_same(tree.unflatten(structure, []), empty)
        assert_same(tree.map(torch.neg, empty), empty)
    assert tree.items(ONE) == [("", ONE)]


@law
@given(trees())
def test_map_keeps_identity_and_composition(t):
    def double(x):
        return x + x

    assert_same(tree.map(lambda x: x, t), t, identical=True)
    assert_same(tree.map(torch.square, tree.map(double, t)), tree.map(lambda x: torch.square(double(x)), t))


@law
@given(trees(tensors(dtypes=(torch.float32,))))
def test_map_meets_the_leaves_of_all_trees_at_one_path(t):
    rows = []
    tree.map(lambda *row: rows.append(row), t, tree.map(id, t), tree.map(lambda x: x.shape, t))
    assert all(key == id(leaf) and shape == leaf.shape for leaf, key, shape in rows)
    named = []
    tree.map_with_path(lambda *row: named.append(row), t, tree.map(id, t))
    assert [(path, leaf_id) for path, _, leaf_id in named] == [(path, id(leaf)) for path, leaf in tree.items(t)]


@law
@given(trees(), trees())
def test_structures_are_equal_exactly_when_maps_meet(a, b):
    same = tree.structure(a) == tree.structure(b)
    try:
        tree.map(lambda x, y: None, a, b)
        met = True
    except ValueError:
        met = False
    assert met == same
    if same:
        tree.check_same_structure(a, b)
    else:
        with pytest.raises(ValueError, match="expected one structure, came two"):
            tree.check_same_structure(a, b)


@pytest.mark.parametrize(
    ("expected", "got", "says"),
    [
        ({"a": 1, "bias": 2}, {"a": 1}, "missing: 'bias'"),
        ({"a": 1}, {"a": 1, "b": [2]}, "unexpected: 'b/0'"),
        ({"l": {"weight": 1}}, {"l": {"wieght": 1}}, "missing: 'l/weight' (did you mean 'l/wieght'?)"),
        ({"a": 1}, {"a": None}, "missing: 'a'"),
        ({"a": 1}, {"a": {"b": 1}}, "unexpected: 'a/b'"),
        ({"a": [1]}, {"a": (1,)}, "a: expected list(0), came tuple(0)"),
        ({"a": None}, {"a": {}}, "a: expected NoneType(), came dict()"),
        ({"a": None, "b": 1}, {"b": 1}, "the root: expected dict(a, b), came dict(b)"),
        ([Pair(1, 2)], [OrderedDict(x=1, y=2)], "0: expected Pair(x, y), came OrderedDict(x, y)"),
        ([Layer(1, 2, 0.0)], [Layer(1, 2)], "0: expected Layer(weight, bias) and (0.0,), came Layer"),
        ({}, dict.fromkeys(map(str, range(20)), 0), "'15' and 12 more"),
    ],
)
def test_a_structural_mismatch_names_the_paths(expected, got, says):
    with pytest.raises(ValueError) as error:
        tree.map(lambda *row: row, expected, got)
    assert says in str(error.value) and "make the second like the first" in str(error.value)
    with pytest.raises(ValueError, match="^state: "):
        tree.check_same_structure(expected, got, what="state")


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"a/b": 1}, "expected a key without '/' that is not empty, came 'a/b'; rename it"),
        ({"a": {"": 1}}, "without '/' that is not empty, came ''; rename it"),
        ({1: 1, "1": 2}, "keys 1 and '1' of one dictionary have one path; rename one"),
        ({1.5: 1}, "of type str or int, came 1.5 of type float; convert it"),
        ({True: 1}, "of type str or int, came True of type bool"),
    ],
)
def test_a_key_that_makes_a_path_ambiguous_is_refused(bad, says):
    for see in (tree.items, tree.paths, tree.format, lambda t: tree.map_with_path(print, t)):
        with pytest.raises(ValueError) as error:
            see(bad)
        assert says in str(error.value)


def test_what_a_mapped_function_raises_names_the_path():
    def fail(leaf):
        if leaf == 3:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no") as error:
        tree.map(fail, {"a": 1, "b": [2, 3]})
    assert error.value.__notes__ == ["at b/1 of the tree"]


def test_unflatten_wants_a_structure_and_as_many_leaves():
    leaves, structure = tree.flatten({"a": 1, "b": 2})
    for given_leaves in ([], [1], [1, 2, 3], iter([1])):
        with pytest.raises(ValueError, match="expected 2 leaves, came [013]; pass one for each path"):
            tree.unflatten(structure, given_leaves)
    with pytest.raises(TypeError, match=r"expected \(structure, leaves\).*came a list first"):
        tree.unflatten(leaves, structure.children())


def test_optree_still_sorts_ints_before_strs():
    # nodes.py sorts again what optree has sorted: if optree changes its order, leaves and paths part
    assert optree.tree_leaves({"a": 2, 1: 1, 10: 1, "1": 0}) == [1, 1, 0, 2]


def test_a_tree_of_all_nodes_round_trips_through_compile():
    t = {
        "layers": [Layer(torch.ones(2), Layer(torch.zeros(1), None, 0.25)), Layer(ONE, torch.ones(3), 0.0)],
        "pair": Pair({3: ONE, "b": ONE, 10: ONE}, None),
        "ordered": OrderedDict(b=ONE, a=torch.zeros(2)),
        "default": defaultdict(list, z=ONE, y=(ONE, [])),
    }

    def step(t):
        chosen = tree.select(t, "layers/*/weight", "**/b")
        t = tree.set_at(t, "layers/0/bias/weight", tree.at(t, "pair/x/3") + 1)
        return tree.map(lambda x: x * 2, t), chosen, tree.size(t), tree.mask("pair/**", t)

    assert_same(compiled(step, t), step(t))
    assert compiled(lambda a: a, t)["layers"][1].rate == 0.0
