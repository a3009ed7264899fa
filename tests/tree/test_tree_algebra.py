"""Algebra of trees is the algebra of the vector of all elements."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from tree_cases import DTYPES, FLOATS, assert_same, tensors, trees

from functrain import tree

law = settings(deadline=None, derandomize=True, max_examples=100)
scalars = st.sampled_from([torch.tensor(-2.0, dtype=torch.float64), torch.tensor(0.5), 0.5, -2.0, 0.0, 1.0])
of_float64 = trees(tensors(dtypes=(torch.float64,)))
of_floats = trees(tensors(dtypes=FLOATS))


def flat(t: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=dtype), *[leaf.reshape(-1).to(dtype) for leaf in tree.leaves(t)]])


def other(t: Any) -> Any:
    """Another tree of the same structure, shapes and dtypes."""
    return tree.map(lambda x: (x * 3 - 1).flip(tuple(range(x.dim()))).to(x.dtype), t)


# The values are small whole numbers and halves: every sum and product is exact in every dtype here.
@law
@given(of_floats, scalars)
def test_algebra_is_that_of_vectors(t, s):
    u = other(t)
    a, b = flat(t), flat(u)
    assert torch.equal(flat(tree.add(t, u)), a + b)
    assert torch.equal(flat(tree.sub(t, u)), a - b)
    assert torch.equal(flat(tree.mul(t, u)), a * b)
    assert torch.equal(flat(tree.scale(s, t)), a * float(s))
    assert torch.equal(flat(tree.add_scale(t, s, u)), a + float(s) * b)
    assert float(tree.vdot(t, u)) == float(a @ b)
    # float32 terms: a square root is rounded once, by at most 2**-24 of it
    assert math.isclose(float(tree.norm(t)), float(a.norm()), rel_tol=2**-23)


@law
@given(of_floats, scalars)
def test_algebra_keeps_shapes_and_dtypes(t, s):
    def kinds(u):
        return [(leaf.shape, leaf.dtype) for leaf in tree.leaves(u)]

    for new in (tree.add(t, t), tree.mul(t, t), tree.scale(s, t), tree.add_scale(t, s, t), tree.zeros_like(t)):
        assert kinds(new) == kinds(t) and tree.structure(new) == tree.structure(t)


def test_a_scalar_tensor_does_not_decide_the_dtype_of_a_scalar_leaf():
    t, wide = [torch.ones((), dtype=torch.bfloat16), torch.ones(2)], torch.tensor(2.0, dtype=torch.float64)
    for new in (tree.scale(wide, t), tree.add_scale(t, wide, t)):
        assert [leaf.dtype for leaf in new] == [torch.bfloat16, torch.float32]


@law
@given(of_float64)
def test_add_sub_and_scale_keep_the_laws_of_a_vector_space(t):
    zero = tree.zeros_like(t)
    assert_same(tree.add(t, zero), t)
    assert_same(tree.sub(t, t), zero)
    assert_same(tree.scale(2.0, t), tree.add(t, t))
    assert_same(tree.add_scale(t, -1.0, t), zero)
    assert float(tree.vdot(t, t)) == pytest.approx(float(tree.norm(t)) ** 2, rel=1e-15)  # one rounding of the root


@law
@given(trees(tensors(dtypes=(torch.complex64, torch.float32))))
def test_complex_trees_have_the_inner_product_of_torch(t):
    a, b = flat(t, torch.complex128), flat(tree.map(lambda x: x * (1j if x.is_complex() else 2), t), torch.complex128)
    u = tree.map(lambda x: x * (1j if x.is_complex() else 2), t)
    assert complex(tree.vdot(t, u)) == complex(torch.vdot(a, b))
    assert tree.norm(t).dtype == torch.float32
    assert math.isclose(float(tree.norm(t)), float(a.norm()), rel_tol=2**-23)  # as above


def test_sums_of_narrow_dtypes_neither_stall_nor_wrap():
    for dtype in (torch.bfloat16, torch.float16):
        ones = {"a": torch.ones(100_000, dtype=dtype), "b": torch.ones((), dtype=dtype)}
        assert float(tree.vdot(ones, ones)) == 100_001 and tree.vdot(ones, ones).dtype == torch.float32
        assert tree.norm(ones).dtype == torch.float32
    assert float(tree.norm({"a": torch.full((4,), 100, dtype=torch.int8), "b": torch.tensor(True)})) == pytest.approx(
        math.sqrt(40_001), rel=2**-23
    )
    assert float(tree.vdot([torch.tensor(200, dtype=torch.uint8)], [torch.tensor(2.0)])) == 400


def test_totals_are_as_wide_as_the_widest_leaf():
    single, double = torch.ones(2), torch.ones(2, dtype=torch.float64)
    assert tree.norm([single]).dtype == torch.float32 and tree.norm([single, double]).dtype == torch.float64
    assert tree.vdot([single, double], [single, double]).dtype == torch.float64
    assert tree.vdot([single.to(torch.complex64), double], [single, double]).dtype == torch.complex128
    for empty in ({}, None, [()]):
        assert tree.norm(empty).dtype == torch.float32 and tree.norm(empty) == tree.vdot(empty, empty) == 0
    assert float(tree.norm([torch.zeros(0, 3)])) == 0


@law
@given(trees(tensors(dtypes=DTYPES)), st.booleans())
def test_where_takes_one_side_whole(t, truth):
    u = tree.map(lambda x: torch.ones_like(x), t)
    assert_same(tree.where(torch.tensor(truth), t, u), t if truth else u)


@law
@given(trees(), st.sampled_from(FLOATS))
def test_cast_touches_floating_point_leaves_only(t, dtype):
    for old, new in zip(tree.leaves(t), tree.leaves(tree.cast(t, dtype)), strict=True):
        assert torch.equal(new, old.to(dtype)) and new.dtype == dtype if old.is_floating_point() else new is old
    assert tree.leaves(tree.cast(["text", 3], dtype)) == ["text", 3]


@law
@given(trees())
def test_likes_keep_shapes_and_fill(t):
    for new, value in ((tree.zeros_like(t), 0), (tree.ones_like(t), 1), (tree.full_like(t, 1), 1)):
        assert_same(new, tree.map(lambda x, value=value: torch.full_like(x, value), t))
    assert {leaf.dtype for leaf in tree.leaves(tree.zeros_like(t, torch.float16))} <= {torch.float16}
    assert_same(tree.to(t, "cpu"), t, identical=True)
    assert {leaf.device.type for leaf in tree.leaves(tree.to(t, "meta"))} <= {"meta"}


@law
@given(trees())
def test_allclose_holds_for_a_tree_and_itself(t):
    assert tree.allclose(t, t) is True
    assert tree.allclose(t, tree.map(lambda x: x.clone(), t))


def test_allclose_tells_what_is_close():
    t = {"a": torch.tensor([1.0, math.nan]), "b": 3, "c": "text"}
    assert tree.allclose(t, {**t, "a": torch.tensor([1.0 + 1e-6, math.nan])})
    assert not tree.allclose(t, {**t, "a": torch.tensor([1.0 + 1e-6, math.nan])}, rtol=0, atol=0)
    assert not tree.allclose(t, {**t, "a": torch.tensor([2.0, math.nan])})
    assert not tree.allclose({"a": torch.ones(1)}, {"a": torch.ones(2)})  # torch alone would broadcast
    assert not tree.allclose(t, {**t, "b": 4}) and not tree.allclose(t, {**t, "b": torch.tensor(3)})


@law
@given(of_float64, scalars)
def test_algebra_runs_under_vmap(t, s):
    leaves, structure = tree.flatten(t)  # torch takes None for a leaf, and cannot map over it
    scalars_of_lanes = torch.tensor([1.0, float(s)], dtype=torch.float64)

    def all_of(s, leaves):
        u = tree.unflatten(structure, leaves)
        return [*tree.leaves(tree.add_scale(u, s, tree.scale(s, u))), tree.norm(u) + s, tree.vdot(u, u) + s]

    mapped = torch.func.vmap(all_of)(scalars_of_lanes, [torch.stack([x, 2 * x]) for x in leaves])
    for lane, factor in enumerate((1.0, 2.0)):
        alone = all_of(scalars_of_lanes[lane], [factor * x for x in leaves])
        assert_same([x[lane] for x in mapped], alone)


def test_algebra_says_what_it_expected_and_where():
    one, two = {"w": [torch.ones(2)]}, {"w": [torch.ones(3)]}
    for fn in (tree.add, tree.sub, tree.mul, tree.vdot):
        with pytest.raises((ValueError, RuntimeError)) as error:
            fn(one, two)
        assert error.value.__notes__ == ["at w/0 of the tree"]
    with pytest.raises(ValueError, match=r"vdot: expected one shape, came \(2,\) and \(1,\); expand one"):
        tree.vdot(one, {"w": [torch.ones(1)]})
    for fn in (tree.add, tree.vdot, tree.allclose):
        with pytest.raises(ValueError, match="missing: 'w/0'"):
            fn(one, {"w": []})
    odd = {"a": torch.ones(1), "b": 3}
    for total in (tree.norm, lambda t: tree.vdot(t, t)):
        with pytest.raises(TypeError, match="expected a tensor, came 3; take it out with tree.partition") as wrong:
            total(odd)
        assert wrong.value.__notes__ == ["at b of the tree"]


def test_options_are_checked():
    t = {"w": torch.ones(2)}
    with pytest.raises(ValueError, match=r"scale: expected a scalar of shape \(\), came \(2,\); use tree.map instead"):
        tree.scale(torch.ones(2), t)
    with pytest.raises(ValueError, match="add_scale: expected a scalar"):
        tree.add_scale(t, torch.ones(2), t)
    with pytest.raises(ValueError, match="cast: expected a floating-point dtype, came torch.int32; use tree.map"):
        tree.cast(t, torch.int32)
    for condition, came in ((True, "bool"), (torch.ones(()), "torch.float32")):
        with pytest.raises(TypeError, match=f"where: expected a condition of dtype torch.bool, came {came}; compare"):
            tree.where(condition, t, t)
    with pytest.raises(TypeError, match="allclose: w: expected torch.float32 in both, came torch.float64"):
        tree.allclose(t, tree.cast(t, torch.float64))
