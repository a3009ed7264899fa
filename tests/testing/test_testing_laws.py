"""What `laws.check` draws, asks and says; that it finds faults is in test_testing_mutants.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_testing_mutants import averaging, each, sound

import functrain as ft
from functrain import optim, tree
from functrain.compiler import compilation
from functrain.testing import assert_trees_equal, laws, strategies

ROOT = Path(__file__).parents[2]
many = settings(deadline=None, derandomize=True, max_examples=100, database=None)


# ---- strategies -----------------------------------------------------------------------------------------------------


def drawn(strategy: Any, number: int = 100) -> list[Any]:
    found: list[Any] = []

    @settings(deadline=None, derandomize=True, max_examples=number, database=None)
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found


def kinds(node: Any) -> set[type]:
    return {type(node), *[kind for _, child in tree.children(node) or () for kind in kinds(child)]}


def test_params_are_of_every_kind_that_a_tree_may_be() -> None:
    values = drawn(strategies.params())
    leaves = [leaf for value in values for leaf in tree.leaves(value)]
    assert {leaf.dtype for leaf in leaves} == set(strategies.DTYPES)
    assert {tuple(leaf.shape) for leaf in leaves} == set(strategies.SHAPES)
    assert {dict, list, tuple, strategies.Pair, type(None), torch.Tensor} <= set.union(*map(kinds, values))
    assert all(1 <= len(tree.leaves(value)) <= 8 for value in values)
    assert any(len({leaf.dtype for leaf in tree.leaves(value)}) > 1 for value in values), "mixed dtypes"
    ids = [[id(leaf) for leaf in tree.leaves(value)] for value in values]
    assert any(len(set(row)) < len(row) for row in ids), "tied leaves"
    untied = [tree.leaves(value) for value in drawn(strategies.params(tied=False))]
    assert all(len({id(leaf) for leaf in row}) == len(row) for row in untied)
    chosen = drawn(strategies.params(shapes=[(4,)], dtypes=[torch.complex64]), 10)
    assert {(tuple(x.shape), x.dtype) for value in chosen for x in tree.leaves(value)} == {((4,), torch.complex64)}


@many
@given(st.data())
def test_gradients_and_masks_are_like_the_params(data: st.DataObject) -> None:
    params = data.draw(strategies.params())
    grads, mask = data.draw(strategies.gradients(params)), data.draw(strategies.masks(params))
    for path, p, g, m in zip(tree.paths(params), *[tree.leaves(x) for x in (params, grads, mask)], strict=True):
        assert (p.shape, p.dtype) == (g.shape, g.dtype), path
        assert isinstance(m, bool) and bool(torch.isfinite(g).all()), path
    assert tree.structure(params) == tree.structure(grads) == tree.structure(mask)


def test_gradients_are_of_unlike_sizes_with_some_zeros_and_a_function_of_the_seed() -> None:
    like = {"a": torch.ones(200), "b": torch.ones(200), "c": torch.ones(200), "n": torch.ones(200).long()}
    sizes = {round(float(torch.log10(strategies.fill(like, seed)["a"].std()))) for seed in range(30)}
    assert len(sizes) > 2
    first = strategies.fill(like, 1)
    assert 2 < int((first["a"] == 0).sum()) < 60
    assert set(first["n"].tolist()) == set(range(10))
    assert_trees_equal(strategies.fill(like, 1), first)
    assert not torch.equal(strategies.fill(like, 2)["a"], first["a"])


@many
@given(st.data())
def test_batches_have_their_rows_in_common(data: st.DataObject) -> None:
    rows = data.draw(st.sampled_from([None, 5]))
    batch = data.draw(strategies.batches(rows=None if rows is None else st.just(rows)))
    (size,) = {leaf.shape[0] for leaf in tree.leaves(batch)}
    assert size == rows or (rows is None and 1 <= size <= 8)


# ---- check ----------------------------------------------------------------------------------------------------------


def test_a_sound_transformation_passes_every_law_that_it_is_asked_for() -> None:
    asked = laws.check(averaging(sound), leafwise=True, debiased=True, compiled=False)
    assert asked == [*COMMON, "leafwise", "debiased", "traced", "traced_once"]
    rate = laws.check(
        lambda rate: optim.sgd(rate, momentum=0.9), descends=True, differentiable=True, compiled=False, examples=5
    )
    assert rate == [*COMMON, "vmapped_rate", "descends", "differentiable", "traced", "traced_once"]
    clip = optim.clip_by_global_norm(1.0)
    asked = laws.check(clip, bounded=(tree.norm, 1.0), examples=5, params={"a": torch.ones(3)}, without=["pure"])
    assert asked == [*COMMON[1:], "bounded", "traced", "traced_once", "compiled"]


COMMON = [
    "pure", "kept", "deterministic", "owned", "unordered", "neutral", "associative", "masked_everywhere",
    "masked_nowhere", "partitioned", "uncounted", "vmapped", "saved", "finite_at_edges",
]  # fmt: skip


def test_a_failure_says_the_law_the_leaf_the_smallest_tree_and_a_way_out() -> None:
    wrong = each(lambda g: g.float() if g.dim() == 2 else g)
    with pytest.raises(laws.LawError) as caught:
        laws.check(wrong, params=strategies.params(dtypes=[torch.bfloat16]), compiled=False, examples=50)
    assert str(caught.value).splitlines() == [
        "the law 'kept' is broken: Updates keep the structure, shapes and dtypes of params; the state keeps its own "
        "from step to step",
        "  updates: expected bfloat16 (2, 3), came float32 (2, 3)",
        "  on params bfloat16 (2, 3) and gradients of seed 0",
        "  way out: return a leaf for each leaf that came, and cast it to the dtype that it had",
    ]
    assert caught.value.params.shape == (2, 3)
    fixed: Any = {"w": {"b": torch.ones(2), "a": torch.ones(2, 2, dtype=torch.float64)}}
    with pytest.raises(
        laws.LawError, match="on params {'w': {'b': float32 \\(2,\\), 'a': float64 \\(2, 2\\)}}"
    ) as caught:
        laws.check(wrong, params=fixed, compiled=False)
    assert (caught.value.law, caught.value.path, caught.value.params) == ("kept", "w/a", fixed)


def test_an_error_of_the_transformation_is_the_cause() -> None:
    with pytest.raises(laws.LawError, match="the law 'pure' is broken: .*\n  ZeroDivisionError: ") as caught:
        laws.check(each(lambda g: g / (1 // g.numel())), compiled=False)
    assert isinstance(caught.value.__cause__, ZeroDivisionError) and caught.value.params.numel() == 0


def test_gradients_may_be_of_every_example() -> None:
    def of_examples(params: Any, seed: int) -> Any:
        rows = [strategies.fill(params, 10 * seed + i) for i in range(2)]
        return tree.map(lambda *leaves: torch.stack(leaves), *rows)

    mean = optim.stateless(lambda updates, params: tree.map(lambda g: g.mean(0), updates))
    kept = laws.check(
        mean, gradients=of_examples, compiled=False, without=["associative", "masked_nowhere"], examples=5
    )
    assert "vmapped" in kept
    with pytest.raises(laws.LawError, match="'kept'"):
        laws.check(optim.identity(), gradients=of_examples, compiled=False)


def test_an_unknown_law_is_refused() -> None:
    with pytest.raises(ValueError, match="without: expected names of laws, came \\['purre'\\]; there are pure, kept"):
        laws.check(optim.identity(), without=["purre", "kept"])


def test_without_hypothesis_the_assertions_work_and_the_laws_say_what_to_install() -> None:
    program = """
import sys; sys.modules["hypothesis"] = None
import functrain as ft
ft.testing.assert_trees_equal({}, {})
try:
    ft.testing.laws
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert "pip install 'functrain[testing]'" in done.stdout, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'law_book'"):
        ft.testing.law_book  # noqa: B018


def test_interpreted_operations_are_those_that_are_compiled() -> None:
    seen = []
    run = compilation.interpret(lambda x, n: seen.append(type(x).__name__) or {"y": x * n})
    assert_trees_equal(run(torch.ones(2), 3), {"y": torch.full((2,), 3.0)})
    assert_trees_equal(run(torch.zeros(2), 3), {"y": torch.zeros(2)})
    assert seen == ["FakeTensor"]
    assert_trees_equal(run(torch.ones(2), 4), {"y": torch.full((2,), 4.0)})
    assert len(seen) == 2
