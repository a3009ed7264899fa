"""Every stack of transforms has the gradient of the loss without them, eager and compiled."""

from __future__ import annotations

from typing import Any

import composition
import pytest
import torch
from composition import BATCH, DIRECTION, KEY, PARAMS, Chain, build, chains

import functrain as ft
from functrain import tree
from functrain.transforms import inductor

# relative to numbers of up to 1e3, at float64: sums of five examples in other orders
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def expected(chain: Chain) -> Any:
    """By torch alone: the gradient, or its derivative along a direction."""
    leaves, structure = tree.flatten(PARAMS)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    total = composition.loss(tree.unflatten(structure, leaves), BATCH, KEY).total
    grads = torch.autograd.grad(total, leaves, create_graph=True)
    if "grad" in chain:
        along = sum(torch.sum(g * v) for g, v in zip(grads, tree.leaves(DIRECTION), strict=True))
        grads = torch.autograd.grad(along, leaves)
    return tree.unflatten(structure, [grad.detach() for grad in grads])


@pytest.mark.parametrize("chain", chains(), ids="-".join)
def test_the_gradient_is_that_of_the_plain_loss(chain: Chain) -> None:
    assert tree.allclose(build(chain)(PARAMS, BATCH, KEY), expected(chain), **CLOSE)


@pytest.mark.parametrize("chain", chains(), ids="-".join)
def test_traced_for_the_compiler_it_is_too(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    # the operations that Inductor would be given: compiling all of them takes three minutes
    monkeypatch.setattr(inductor, "compile_graph", lambda graph, inputs: graph)
    assert tree.allclose(ft.compile(build(chain))(PARAMS, BATCH, KEY), expected(chain), **CLOSE)


def test_compiled_the_longest_stack_is_too() -> None:
    chain = ("recompute", "mixed_precision", "loss scale", "accumulate", "sweep")
    assert chain in chains()
    assert tree.allclose(ft.compile(build(chain))(PARAMS, BATCH, KEY), expected(chain), **CLOSE)


def test_compiled_in_pieces_a_stack_is_too() -> None:
    loss = ft.recompute_layers(composition.in_float64(ft.recompute(composition.loss)))
    optimizer = ft.optim.sgd(1.0)
    # a loop over parts is compiled in pieces whatever its size
    step = ft.compile(ft.train_step(loss, optimizer, accumulate=2))
    state = ft.init_state(PARAMS, optimizer, key=KEY)
    new, metrics = step(state, BATCH)
    grads = tree.scale(metrics["weight"], tree.sub(PARAMS, new.params))
    assert tree.allclose(grads, expected(()), **CLOSE)


def test_the_page_has_the_table() -> None:
    assert composition.BEGIN + composition.table() + composition.END in composition.PAGE.read_text()
