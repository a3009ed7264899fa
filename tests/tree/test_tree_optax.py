"""What ft.tree has from optax.tree: the values are optax's, and the fields of a state are found as optax finds them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from later import Later
from tree_cases import FLOATS, tensors, trees

import functrain.optim as optim
from functrain import tree

jax = Later("jax")
jnp = Later("jax.numpy")
optax = Later("optax")

law = settings(deadline=None, derandomize=True, max_examples=3, database=None)


class State(NamedTuple):
    count: Any
    mu: Any


def numbers(seed: int) -> Any:
    draw = np.random.default_rng(seed)
    shapes = [(), (3,), (2, 3), (0, 2)]
    picks = draw.integers(0, len(shapes), 3)
    return {name: draw.normal(size=shapes[i]).astype(np.float32) for name, i in zip("abc", picks, strict=True)}


def both(seed: int) -> tuple[Any, Any]:
    values = numbers(seed)
    return jax.tree.map(torch.tensor, values), jax.tree.map(jnp.asarray, values)


def assert_same(mine: Any, theirs: Any) -> None:
    assert tree.paths(mine) == tree.paths(jax.tree.map(np.asarray, theirs))
    for a, b in zip(tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        # a few roundings of 6e-8 of numbers of order 1
        np.testing.assert_allclose(a.numpy(), np.asarray(b), rtol=1e-5, atol=1e-6)
        assert tuple(a.shape) == np.shape(b)


CASES = {
    "add": lambda t, a, b: t.add(a, b, a),
    "sub": lambda t, a, b: t.sub(a, b),
    "mul": lambda t, a, b: t.mul(a, b),
    "div": lambda t, a, b: t.div(a, b),
    "scale": lambda t, a, b: t.scale(0.5, a),
    "add_scale": lambda t, a, b: t.add_scale(a, 0.5, b),
    "vdot": lambda t, a, b: t.vdot(a, b),
    "sum": lambda t, a, b: t.sum(a),
    "max": lambda t, a, b: t.max(a),
    "min": lambda t, a, b: t.min(a),
    "norm": lambda t, a, b: t.norm(a),
    "squared norm": lambda t, a, b: t.norm(a, squared=True),
    "norm of order 2": lambda t, a, b: t.norm(a, ord=2),
    "norm of order 1": lambda t, a, b: t.norm(a, ord=1),
    "squared norm of order 1": lambda t, a, b: t.norm(a, 1, True),
    "norm of order inf": lambda t, a, b: t.norm(a, ord=math.inf) if t is tree else jnp.maximum(t.norm(a, ord="inf"), 0),
    "batch_shape": lambda t, a, b: t.batch_shape(a, (4, 1)),
    "clip": lambda t, a, b: t.clip(a, -0.5, 0.3),
    "clip below": lambda t, a, b: t.clip(a, min_value=0.1),
    "clip above": lambda t, a, b: t.clip(a, max_value=0.1),
    "conj": lambda t, a, b: t.conj(a),
    "real": lambda t, a, b: t.real(a),
    "full_like": lambda t, a, b: t.full_like(a, 3.0),
    "ones_like": lambda t, a, b: t.ones_like(a),
    "zeros_like": lambda t, a, b: t.zeros_like(a),
    "cast None": lambda t, a, b: t.cast(a, None),
}


@law
@given(st.integers(0, 1000), st.integers(0, 1000))
def test_the_algebra_is_that_of_optax(seed, other):
    mine_a, theirs_a = both(seed)
    # the second tree like the first
    mine_b, theirs_b = (jax.tree.map(lambda x: x * (other % 7 - 3) + 1.5, t) for t in (mine_a, theirs_a))
    for case in CASES.values():
        mine, theirs = case(tree, mine_a, mine_b), case(optax.tree, theirs_a, theirs_b)
        assert_same(mine, theirs)


def test_numbers_of_nothing():
    for empty in ({}, {"a": torch.zeros(0)}):
        assert tree.max(empty) == -math.inf and tree.min(empty) == math.inf and tree.sum(empty) == 0
        assert tree.norm(empty) == tree.norm(empty, 1) == tree.norm(empty, "inf") == 0


def test_a_sum_of_integers_is_one_and_of_bfloat16_is_float32():
    assert tree.sum({"a": torch.tensor([100, 100], dtype=torch.int8), "b": torch.tensor(2)}).dtype == torch.int64
    ones = torch.ones(4096, dtype=torch.bfloat16)  # a bfloat16 sum stops at 256
    assert tree.sum([ones, ones]) == 8192 and tree.sum([ones]).dtype == torch.float32
    with pytest.raises(ValueError, match="expected the order None, 1, 2 or inf, came 3"):
        tree.norm([ones], ord=3)


def test_conj_and_real_are_of_complex_leaves():
    z = {"z": torch.tensor([1 + 2j]), "x": torch.tensor([3.0])}
    assert torch.equal(tree.conj(z)["z"].resolve_conj(), torch.tensor([1 - 2j])) and tree.conj(z)["x"] == 3
    assert torch.equal(tree.real(z)["z"], torch.tensor([1.0])) and tree.real(z)["x"] == 3


def test_bounds_and_fills_may_be_tensors_and_are_mapped():
    leaves = {"a": torch.tensor([-2.0, 2.0]), "b": torch.tensor([5.0], dtype=torch.float64)}
    bounds = torch.tensor([0.5, 1.0])
    clipped = torch.func.vmap(lambda bound: tree.clip(leaves, -bound, bound))(bounds)
    assert clipped["a"].tolist() == [[-0.5, 0.5], [-1.0, 1.0]] and clipped["b"].dtype == torch.float64
    filled = torch.func.vmap(lambda value: tree.full_like(leaves, value))(bounds)
    assert filled["a"].tolist() == [[0.5, 0.5], [1.0, 1.0]] and filled["b"].dtype == torch.float64


@law
@given(trees(tensors(dtypes=FLOATS)))
def test_cast_like_gives_the_dtypes_of_another_tree(t):
    half = tree.map(lambda x: x.to(torch.float16), t)
    assert [x.dtype for x in tree.leaves(tree.cast_like(half, t))] == [x.dtype for x in tree.leaves(t)]


def test_the_dtype_of_a_tree():
    f16, f32, bf16 = (torch.zeros(1, dtype=d) for d in (torch.float16, torch.float32, torch.bfloat16))
    assert tree.dtype({"a": f32, "b": f32}) == torch.float32 and tree.dtype({}) == torch.float32
    assert tree.dtype([f16, f32], "lowest") == torch.float16 and tree.dtype([f16, f32], "highest") == torch.float32
    assert tree.dtype([f16, bf16], "promote") == torch.float32
    with pytest.raises(ValueError, match=r"a has torch.float16; expected it everywhere, came 'b \(torch.float32\)'"):
        tree.dtype({"a": f16, "b": f32})
    with pytest.raises(ValueError, match="came torch.float16 and torch.bfloat16; cast one"):
        tree.dtype([f16, bf16], "highest")
    with pytest.raises(ValueError, match="'highest' or 'lowest', came 'widest'"):
        tree.dtype([f16], "widest")


def test_nan_is_nan_unless_asked():
    nan = {"a": torch.tensor([1.0, torch.nan])}
    assert tree.allclose(nan, nan) and not tree.allclose(nan, nan, equal_nan=False)


# ---- named fields -------------------------------------------------------------------------------------------------


def states() -> list[tuple[Any, Any]]:
    """Optimizer states of one construction in both libraries."""
    made = []
    for library, zeros in ((optim, torch.zeros), (optax, jnp.zeros)):
        params = {"w": zeros(2), "b": zeros(1)}
        masked = library.masked(library.adam(0.1), {"w": True, "b": False})
        chained = library.chain(library.clip_by_global_norm(1.0), library.adamw(0.1), library.trace(0.9), masked)
        injected = library.inject_hyperparams(library.sgd)(learning_rate=lambda count: 1.0 / (count + 1))
        made.append([chained.init(params), injected.init(params), [{"x": 1, "y": {"x": 2}}, {"x": {"x": 3}}]])
    return list(zip(*made, strict=True))


FIELDS = ["count", "mu", "w", "b", "trace", "x", "learning_rate"]
NAMES = [*FIELDS, "ScaleByAdamState", "MaskedState", "EmptyState"]


@pytest.mark.parametrize("name", [*NAMES, "no such name"])
def test_values_by_name_are_those_that_optax_finds(name):
    for mine, theirs in states():
        found = tree.get_all_with_path(mine, name)
        want = optax.tree.get_all_with_path(theirs, name)
        assert sorted(map(shape_of, (v for _, v in found))) == sorted(map(shape_of, (v for _, v in want)))
        assert all(tree.at(mine, path) is value for path, value in found)
        if len(want) > 1:
            with pytest.raises(KeyError, match=f"expected one value named '{name}', came {len(want)}"):
                tree.get(mine, name)
        else:
            got, expected = tree.get(mine, name, "default"), optax.tree.get(theirs, name, "default")
            assert shape_of(got) == shape_of(expected)


def shape_of(value: Any) -> str:
    shapes = [tuple(np.shape(leaf)) for leaf in jax.tree.leaves(value)]
    return str(shapes) + type(value).__name__.replace("ArrayImpl", "Tensor")


@pytest.mark.parametrize("name", NAMES)
def test_setting_by_name_sets_what_optax_sets(name):
    for mine, theirs in states():
        if not tree.get_all_with_path(mine, name):
            continue
        if name == "count" and type(mine).__name__ == "InjectStatefulHyperparamsState":
            continue  # optax sets no count below a node without one below a node with one
        new, want = tree.set(mine, **{name: 7}), optax.tree.set(theirs, **{name: 7})
        assert [x if x == 7 else None for x in map(seven, tree.leaves(new))] == [
            x if x == 7 else None for x in map(seven, jax.tree.leaves(want))
        ]


def seven(leaf: Any) -> Any:
    return leaf if isinstance(leaf, int) else None


def test_a_filter_chooses_by_path_and_value():
    state = {"a": State(torch.tensor(1), {"w": 2}), "b": State(torch.tensor(3), {"w": 4})}
    assert tree.get(state, "w", filtering=lambda path, value: path.startswith("a/")) == 2
    assert tree.get(state, "w", filtering=lambda path, value: value == 4) == 4
    new = tree.set(state, lambda path, value: path == "b/count", count=torch.tensor(9))
    assert new["b"].count == 9 and new["a"].count == 1 and new["b"].mu is not None
    assert tree.get(tree.get(state, "b"), "count") == 3
    assert type(new["b"]) is State and state["b"].count == 3


def test_whatever_is_found_is_set_inside_other_nodes_too():
    state = State(torch.tensor(1), {"w": {"count": 5}})  # optax's get finds both counts, its set the first alone
    new = tree.set(state, count=7)
    assert new == State(7, {"w": {"count": 7}}) and len(tree.get_all_with_path(state, "count")) == 2


def test_what_cannot_be_set_is_named():
    state = {"a": State(torch.tensor(1), {"w": 2})}
    with pytest.raises(KeyError, match=r"nothing named 'nu'; the tree has 'a', 'count', 'mu', 'w'"):
        tree.set(state, nu=1)
    with pytest.raises(KeyError, match="nothing named 'count' that the filter lets pass"):
        tree.set(state, lambda path, value: False, count=1)


def test_a_field_is_set_inside_a_compiled_function():
    optimizer = optim.adam(0.1)
    state = optimizer.init({"w": torch.zeros(2)})

    @torch.compile(fullgraph=True, backend="eager")
    def reset(state):
        return tree.set(state, count=tree.get(state, "count") * 0 + 5)

    assert tree.get(reset(state), "count") == 5
