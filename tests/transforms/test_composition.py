"""Every stack of transforms has the gradient of the loss without them, eager and compiled."""

from __future__ import annotations

from typing import Any

import composition_table
import pytest
import torch
from composition import (
    BATCH,
    KEY,
    PARAMS,
    STACKS,
    TRANSFORMS,
    WAYS,
    Chain,
    chains,
    close,
    expected,
    gradient_by_a_step,
    loss,
    stepping,
)

import functrain as ft
from functrain import optim, tree

NAMES = list(TRANSFORMS)


@pytest.mark.parametrize("inside", NAMES)
def test_the_gradient_is_that_of_the_plain_loss(inside: str) -> None:
    for chain in [(inside,), *[(inside, around) for around in NAMES]]:
        assert close(WAYS["eager"](chain), expected(chain)), chain


@pytest.mark.parametrize("chain", STACKS, ids="-".join)
def test_a_stack_of_more_has_it_too(chain: Chain) -> None:
    assert close(WAYS["eager"](chain), expected(chain))


# each transform once inside and once around, with partners that are not its neighbours
SOME = [(inside, NAMES[(i + 9) % len(NAMES)]) for i, inside in enumerate(NAMES)]
SOME.append(("sweep", "hessian"))  # a tangent of zeros of what is not laid out in order


@pytest.mark.parametrize("chain", [*SOME, *STACKS], ids="-".join)
def test_traced_for_the_compiler_it_is_too(chain: Chain) -> None:
    # the operations that Inductor would be given; tests/transforms/composition.py compiles all of them
    assert close(WAYS["traced"](chain), expected(chain))


COMPILED = [
    ("compiled", ("recompute", "mixed_precision", "accumulate")),
    ("compiled", ("jacfwd", "vmap")),
    ("in pieces", ("recompute_layers",)),
    ("donated", ("from_module",)),
]


@pytest.mark.parametrize(("way", "chain"), COMPILED)
def test_compiled_to_the_end_it_is_too(way: str, chain: Chain) -> None:
    assert close(WAYS[way](chain), expected(chain))


def test_a_loop_over_parts_compiled_in_pieces_is_too() -> None:
    fn = ft.recompute_layers(TRANSFORMS["mixed_precision"](ft.recompute(loss)))
    step = ft.compile(ft.train_step(fn, optim.sgd(1.0), accumulate=2))
    assert close(gradient_by_a_step(step), expected(()))


@pytest.fixture(scope="module")
def compiled() -> Any:
    """A loss that was called already, so that its program is there."""
    fn = ft.compile(loss)
    fn(PARAMS, BATCH, KEY)
    return fn


@pytest.mark.parametrize("around", NAMES)
def test_a_compiled_function_inside_is_an_error(around: str, compiled: Any) -> None:
    with pytest.raises(TypeError, match="put ft.compile outermost"):
        ft.grad(TRANSFORMS[around](compiled))(PARAMS, BATCH, KEY)


def test_what_only_adds_or_loops_takes_a_compiled_function() -> None:
    grad_fn = ft.accumulate(ft.compile(ft.value_and_grad(loss)), 2)
    assert close(grad_fn(PARAMS, BATCH, KEY)[1], expected(()))
    step = ft.compile(stepping(()), donate=True)
    assert close(gradient_by_a_step(lambda state, batch: ft.unroll(step, state, [batch])), expected(()))


def test_a_donated_step_inside_is_an_error() -> None:
    step = ft.compile(stepping(()), donate=True)
    state = ft.init_state(PARAMS, optim.sgd(1.0), key=KEY)
    swept = ft.sweep(step, {"params": [PARAMS, PARAMS]})
    with pytest.raises(TypeError, match="put ft.compile outermost"):
        swept(swept.init(state), BATCH)

    def after(params: Any) -> Any:
        return tree.sum(ft.unroll(step, state._replace(params=params), [BATCH])[0].params)

    with pytest.raises(TypeError, match="put ft.compile outermost"):
        ft.grad(after)(PARAMS)


def test_nothing_in_the_matrix_is_zero_or_alike() -> None:
    # a transform that lost the gradient, or took that of its neighbour, would be seen
    kinds = [(), ("grad",), ("hessian",), ("ggnvp",), ("grad", "hessian"), ("ggnvp", "grad")]
    found = [torch.cat([leaf.flatten() for leaf in tree.leaves(expected(chain))]) for chain in kinds]
    assert all(torch.count_nonzero(leaves) >= 12 for leaves in found)
    assert all(not torch.allclose(a, b) for i, a in enumerate(found) for b in found[:i])


def test_the_page_has_the_table_and_nothing_compiled_wrong() -> None:
    page = composition_table
    assert page.BEGIN + page.table() + page.END in page.PAGE.read_text(encoding="utf-8")
    assert set(page.outcomes()) == set(page.cells()), "python tests/transforms/composition.py --compile 500 goes on"
    assert {outcome for outcome in page.outcomes().values()} == {"equal"}
    assert len(chains()) == len(set(chains()))
