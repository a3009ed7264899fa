"""Assertions over trees: what passes, and that a message names the leaf and what is in it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import functrain as ft
from functrain import testing
from functrain.compiler import compilation
from functrain.testing import (
    assert_max_traces,
    assert_trees_close,
    assert_trees_equal,
    assert_trees_finite,
    variants,
)

ROOT = Path(__file__).parents[2]
NAN = float("nan")


class Pair(NamedTuple):
    left: Any
    right: Any


def values() -> Any:
    return {"w": torch.tensor([[1.0, 2.0], [3.0, NAN]]), "rest": [Pair(torch.tensor(7), None), torch.empty(0, 3), "a"]}


# ---- equal, close, finite -------------------------------------------------------------------------------------------


def test_a_tree_is_equal_and_close_to_a_copy_of_itself() -> None:
    copy = ft.tree.map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, values())
    assert_trees_equal(copy, values())
    assert_trees_close(copy, values())


@pytest.mark.parametrize(
    ("path", "leaf", "message"),
    [
        ("w", torch.tensor([[1.0, 2.5], [2.0, NAN]]), r"w: 2 of 4.* at \(1, 0\): expected 3.0, came 2.0 \(off by 1\)$"),
        ("w", torch.ones(2, 2), r"w: 3 of 4 elements, the furthest off at \(1, 1\): expected nan, came 1.0$"),
        ("w", torch.ones(4), r"w: expected float32 \(2, 2\), came float32 \(4,\)"),
        ("w", values()["w"].double(), r"w: expected float32 \(2, 2\), came float64 \(2, 2\)"),
        ("w", values()["w"].to("meta"), r"w: expected float32 \(2, 2\), came float32 \(2, 2\) on meta"),
        ("rest/0/left", torch.tensor(8), r"rest/0/left: 1 of 1 elements, the furthest off expected 7, came 8"),
        ("rest/1", torch.empty(3, 0), r"rest/1: expected float32 \(0, 3\), came float32 \(3, 0\)"),
        ("rest/2", "b", "rest/2: expected 'a', came 'b'"),
        ("rest/2", 1, "rest/2: expected str, came int"),
    ],
)  # fmt: skip
def test_a_leaf_that_differs_is_named(path: str, leaf: Any, message: str) -> None:
    other = ft.tree.set_at(values(), path, leaf)
    for compare in (assert_trees_equal, assert_trees_close):
        with pytest.raises(AssertionError, match=f"{compare.__name__}: 1 of 4 leaves fail\n  {message}"):
            compare(other, values())


def test_other_structures_are_named() -> None:
    for compare in (assert_trees_equal, assert_trees_close):
        with pytest.raises(ValueError, match="missing: 'b'\n  unexpected: 'c'"):
            compare({"a": torch.ones(1), "c": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)})


def test_equal_means_the_bits() -> None:
    assert_trees_close(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
    with pytest.raises(AssertionError, match=r"the tree itself: 1 of 2 .* expected -0.0, came 0.0$"):
        assert_trees_equal(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
    off = torch.tensor(1.0 + 2**-23)
    assert_trees_close(off, torch.tensor(1.0))
    with pytest.raises(AssertionError):
        assert_trees_equal(off, torch.tensor(1.0))
    z = torch.tensor([1 + 2j])
    assert_trees_equal(z.conj(), torch.tensor([1 - 2j]))
    with pytest.raises(AssertionError):
        assert_trees_equal(z.conj(), z)


def test_close_is_relative_to_what_was_expected() -> None:
    big, near, far = torch.tensor([1e4, 1.0]), torch.tensor([1e4 + 0.5, 1.0]), torch.tensor([1e4, 1.5])
    assert_trees_close({"a": near}, {"a": big}, rtol=1e-4)
    assert_trees_close({"a": far}, {"a": big}, rtol=0.0, atol=0.5)
    for other, tolerances in ((near, {"rtol": 1e-5}), (far, {"rtol": 1e-4}), (far, {"rtol": 0.0, "atol": 0.4})):
        with pytest.raises(AssertionError, match="a: 1 of 2"):
            assert_trees_close({"a": other}, {"a": big}, **tolerances)
    half = torch.tensor([1.0], dtype=torch.bfloat16)
    assert_trees_close(half, half.clone())
    with pytest.raises(AssertionError, match="came True"):
        assert_trees_close(torch.tensor(True), torch.tensor(False), atol=10.0)


def test_what_is_not_finite_is_counted() -> None:
    bad = {"a": torch.ones(2), "b": torch.tensor([NAN, float("inf"), -float("inf"), 1.0]), "n": torch.tensor(3)}
    assert_trees_finite(values()["rest"], bad["a"], {"lr": 0.1})
    with pytest.raises(AssertionError, match="1 of 3 leaves fail\n  b: 1 NaN and 2 infinite of 4 elements"):
        assert_trees_finite({}, bad)
    with pytest.raises(AssertionError, match="lr: came nan"):
        assert_trees_finite({"lr": NAN})


def test_a_message_lists_the_first_leaves_only() -> None:
    with pytest.raises(AssertionError, match=r"12 of 12(.|\n)*and 4 more$") as caught:
        assert_trees_equal([torch.ones(1)] * 12, [torch.zeros(1)] * 12)
    assert len(str(caught.value).splitlines()) == 10


# ---- traces ---------------------------------------------------------------------------------------------------------


def test_a_function_is_traced_as_often_as_it_is_compiled() -> None:
    # an identity: Inductor has nothing to compile
    compiled = ft.compile(assert_max_traces(1)(lambda x, n: {"x": x, "n": n}))
    for _ in range(3):
        compiled(torch.ones(2), torch.tensor(1.0))
    with pytest.raises(AssertionError, match=r"assert_max_traces\(1\): <lambda> is traced for the second time; keep"):
        compiled(torch.ones(3), torch.tensor(1.0))
    plain = assert_max_traces(0)(lambda x: x)
    plain(torch.ones(2))
    with pytest.raises(ValueError, match="n >= 0, came -1"):
        assert_max_traces(-1)


@pytest.mark.parametrize("cut_at_bytes", [0, 2**62])
def test_a_counted_step_is_traced_once_for_all_its_parts(cut_at_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "_PIECEWISE_BYTES", cut_at_bytes)

    @assert_max_traces(1)
    def traced_once(params: Any, batch: Tensor, key: Tensor) -> ft.Loss:
        return ft.Loss(torch.sum(params["w"] * batch), torch.tensor(2.0), {})

    plain = ft.train_step(traced_once.__wrapped__, ft.optim.sgd(0.5), accumulate=2)
    counted = assert_max_traces(1)(ft.train_step(traced_once, plain.optimizer, accumulate=2))
    assert counted.optimizer is plain.optimizer, "by which a sweep begins"
    state, compiled = ft.init_state({"w": torch.ones(2)}, plain.optimizer, key=ft.random.key(0)), ft.compile(counted)
    for size in (2.0, 3.0):  # halves of whole numbers: every order of the sums gives the same bits
        batch = torch.full((4, 2), size)
        assert_trees_equal(compiled(state, batch)[0].params, plain(state, batch)[0].params)
    with pytest.raises(AssertionError, match="traced for the second time"):
        compiled(state, torch.ones(6, 2))


# ---- variants -------------------------------------------------------------------------------------------------------


@ft.tree.dataclass
class Box:
    x: Any
    none: Any = None


def boxed(box: Box, scale: Tensor, *, power: int) -> Any:
    return Box((box.x * scale) ** power), [torch.sum(box.x), None]


@pytest.mark.parametrize("variant", variants())
def test_every_variant_is_the_function(variant: testing.Variant) -> None:
    made = variant(lambda box, scale: boxed(box, scale, power=2))(Box(torch.arange(3.0)), torch.tensor(2.0))
    assert_trees_equal(made, (Box(torch.tensor([0.0, 4.0, 16.0])), [torch.tensor(3.0), None]))


def test_the_variants_are_what_they_are_called(request: pytest.FixtureRequest) -> None:
    assert [v.__name__ for v in variants()] == ["eager", "compiled", "vmapped"]
    assert [v.__name__ for v in variants("vmapped", "eager")] == ["vmapped", "eager"]
    with pytest.raises(ValueError, match="out of eager, compiled, vmapped, came \\['jitted'\\]"):
        variants("eager", "jitted")
    (mapped,) = variants("vmapped")
    wrapped = []
    mapped(lambda x: wrapped.append(torch._C._functorch.is_batchedtensor(x)) or x)(torch.ones(2))
    assert wrapped == [True]
    assert_trees_equal(mapped(boxed)(Box(torch.ones(2)), 3.0, power=2)[0].x, torch.full((2,), 9.0))
    with pytest.raises(TypeError, match="vmapped: n: expected a tensor, came 3"):
        mapped(lambda x: {"x": x, "n": 3})(torch.ones(2))
    with pytest.raises(TypeError, match=r"item\(\).*the same for all examples"):
        mapped(lambda x: x * x.item())(torch.ones(()))


# ---- the side tower -------------------------------------------------------------------------------------------------


def run_python(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_testing_is_there_and_costs_nothing_until_it_is_used() -> None:
    program = "import sys, functrain as ft; print([m for m in ('hypothesis', 'functrain.testing') if m in sys.modules])"
    assert run_python(program + "; ft.testing.assert_trees_finite({})") == "[]"
    assert "testing" in ft.__all__
    with pytest.raises(AttributeError, match=re.escape("module 'functrain' has no attribute 'tessting'")):
        ft.tessting  # noqa: B018
