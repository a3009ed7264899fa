"""Trees while torch.compile traces: the same as in eager, compiled once, with the same errors."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tree_cases import Layer, Pair, assert_same, compiled, tensors, trees

from functrain import tree

ONE = torch.ones(())


def everything(t: Any) -> Any:
    """What every function of structure makes of a tree of float32 tensors."""
    leaves, structure = tree.flatten(t)
    hit, miss = tree.partition(lambda path, leaf: leaf.dim() == 0, t)
    return {
        "again": tree.unflatten(structure, [leaf + 1 for leaf in leaves]),
        "mapped": tree.map(torch.add, t, tree.zeros_like(t)),
        "lengths": tree.map_with_path(lambda path, leaf: leaf * len(path), t),
        "paths": tree.paths(t),
        "same": (structure == tree.structure(tree.map(torch.neg, t)), structure == tree.structure([t])),
        "parts": (hit, miss, tree.combine(hit, miss)),
        "norm": tree.norm(t),
    }


@settings(deadline=None, derandomize=True, max_examples=3)
@given(st.tuples(*[trees(tensors(dtypes=(torch.float32,)), max_leaves=4)] * 2))
def test_traced_equals_eager(t):
    assert_same(compiled(everything, t), everything(t))


def test_structures_differ_alike_while_traced():
    trees_apart = [
        {"a": ONE, "b": ONE},
        OrderedDict(a=ONE, b=ONE),
        OrderedDict(b=ONE, a=ONE),
        defaultdict(list, a=ONE, b=ONE),
        defaultdict(int, a=ONE, b=ONE),
        {"a": ONE, "c": ONE},
        {"a": ONE, "b": None},
        {"a": ONE, "b": 3},
        {"a": ONE, "b": [ONE]},
        [ONE, ONE],
        (ONE, ONE),
        Pair(ONE, ONE),
        Layer(ONE, ONE, 0.0),
        Layer(ONE, ONE, 0.5),
    ]

    def table(given):
        kinds = [tree.structure(t) for t in given]
        return [[a == b for a in kinds[: i + 1]] for i, b in enumerate(kinds)]

    assert compiled(table, trees_apart) == table(trees_apart)


def test_a_static_field_compiles_again_and_a_leaf_does_not():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(lambda layer: tree.map(lambda x: x * layer.rate, layer), backend=counter, fullgraph=True)
    for rate, count in ((0.5, 1), (0.5, 1), (0.25, 2)):
        layer = step(Layer(torch.ones(2), torch.rand(2), rate))
        assert torch.equal(layer.weight, torch.full((2,), rate)) and layer.rate == rate
        assert counter.frame_count == count


def test_the_state_that_a_compiled_step_returns_does_not_compile_it_again():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(lambda t: tree.map(lambda x: x + 1, t), backend=counter, fullgraph=True)
    state: Any = {"wte": torch.zeros(2), "blocks": [{"w": torch.zeros(1), "b": torch.zeros(1)}], "a": torch.zeros(3)}
    for _ in range(3):
        state = step(state)
    assert counter.frame_count == 1 and state["a"][0] == 3


def test_errors_keep_their_text_while_traced():
    with pytest.raises(Exception, match=r"missing: 'b'"):
        compiled(lambda t: tree.map(torch.add, t, {"a": t["a"]}), {"a": ONE, "b": ONE})
    structure = tree.structure({"a": ONE})
    with pytest.raises(Exception, match="expected a structure made inside the compiled function"):
        compiled(lambda x: tree.unflatten(structure, [x]), ONE)
    with pytest.raises(Exception, match="expected 1 leaves, came 2"):
        compiled(lambda t: tree.unflatten(tree.structure(t), [t["a"], t["a"]]), {"a": ONE})
    with pytest.raises(Exception, match="no 'c' here; there is 'a'"):
        compiled(lambda t: tree.at(t, "c"), {"a": ONE})
