"""Functions run on parts of a batch give what optax's do, and what the whole batch gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from later import Later

import functrain as ft
import functrain.optim as ours
import functrain.tree as tree
from functrain.optim import microbatching as mb

jax = Later("jax")
jnp = Later("jax.numpy")
optax = Later("optax")

law = settings(deadline=None, derandomize=True, max_examples=6, database=None)
ROWS = 6


def batch_of(seed: int, dim: int = 0) -> Any:
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(ROWS, 3)).astype(np.float32)
    return {"x": x if dim == 0 else x.T.copy(), "y": draw.normal(size=(ROWS,) if dim == 0 else (2, ROWS)).astype("f")}


def in_torch(t: Any) -> Any:
    return jax.tree.map(lambda leaf: torch.from_numpy(np.array(leaf)), t)


def check(mine: Any, theirs: Any) -> None:
    for (path, got), expected in zip(tree.items(mine), jax.tree.leaves(theirs), strict=True):
        # sums of six float32 in another order
        np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=1e-5, atol=1e-5, err_msg=path)


@law
@given(
    size=st.sampled_from([1, 2, 3, 6]),
    dim=st.sampled_from([0, 1]),
    way=st.sampled_from(["SUM", "MEAN", "RUNNING_MEAN"]),
    real=st.sampled_from([None, 1]),
    seed=st.integers(0, 9),
)
def test_a_microbatched_function_is_that_of_optax(size: int, dim: int, way: str, real: int | None, seed: int) -> None:
    batch = batch_of(seed, dim)

    def fun(lib: Any) -> Any:
        return lambda scale, batch: (lib.sum(batch["x"], dim) * scale, {"each": batch["y"] + batch["x"][0].sum()})

    # a result with rows first can be concatenated
    accumulators = [
        (getattr(kind, way), kind.CONCAT) for kind in (mb.AccumulationType, optax.microbatching.AccumulationType)
    ]
    args = dict(argnums=1, microbatch_size=size, in_axes=dim, num_real_microbatches=real)
    mine = ours.microbatch(fun(torch), accumulator=accumulators[0], **args)(2.0, in_torch(batch))
    theirs = optax.microbatch(fun(jnp), accumulator=accumulators[1], **args)(2.0, jax.tree.map(jnp.asarray, batch))
    check(mine, theirs)


@law
@given(size=st.sampled_from([None, 1, 3]), way=st.sampled_from(["SUM", "MEAN", "CONCAT"]), seed=st.integers(0, 9))
def test_a_micro_vmap_is_that_of_optax(size: int | None, way: str, seed: int) -> None:
    batch = batch_of(seed)

    def fun(lib: Any) -> Any:
        return lambda scale, row, bias: {"a": lib.sin(row["x"]) * scale + bias, "b": lib.sum(row["x"]) * row["y"]}

    bias = np.arange(ROWS, dtype="f")
    mine = mb.micro_vmap(fun(torch), (None, 0), microbatch_size=size, accumulator=getattr(mb.AccumulationType, way))(
        torch.tensor(2.0), in_torch(batch), bias=torch.from_numpy(bias)
    )
    theirs = optax.microbatching.micro_vmap(
        fun(jnp), (None, 0), microbatch_size=size, accumulator=getattr(optax.microbatching.AccumulationType, way)
    )(2.0, jax.tree.map(jnp.asarray, batch), bias=jnp.asarray(bias))
    check(mine, theirs)


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("keep", [True, False])
def test_micro_grad_is_that_of_optax_and_of_each_row(size: int | None, keep: bool) -> None:
    batch, params = batch_of(3), np.array([0.5, -1.0, 2.0], "f")

    def loss(lib: Any) -> Any:
        return lambda w, batch: (lib.mean((batch["x"] @ w - batch["y"]) ** 2), {"sum": lib.sum(batch["x"])})

    def args(lib: Any, kind: Any) -> dict[str, Any]:
        return dict(
            has_aux=True,
            keep_batch_dim=keep,
            microbatch_size=size,
            accumulator=(kind.SUM, kind.MEAN),
            transform_fn=lambda g: (g, g**2),
            metrics_fn=lambda g: lib.sum(g * g),
        )

    mine = mb.micro_grad(loss(torch), **args(torch, mb.AccumulationType))(torch.from_numpy(params), in_torch(batch))
    theirs = optax.microbatching.micro_grad(loss(jnp), **args(jnp, optax.microbatching.AccumulationType))(
        jnp.asarray(params), jax.tree.map(jnp.asarray, batch)
    )
    check(mine, theirs)
    rows = [
        ft.grad(lambda w, i=i: loss(torch)(w, tree.map(lambda x: x[i : i + 1], in_torch(batch)))[0])(
            torch.from_numpy(params)
        )
        for i in range(ROWS)
    ]
    torch.testing.assert_close(mine[0][0], torch.stack(rows).sum(0), rtol=1e-5, atol=1e-5)
    assert mine[1].metrics.shape == mine[1].values.shape == mine[1].aux["sum"].shape == (ROWS,)


def test_the_number_of_parts_that_count_may_be_a_tensor() -> None:
    x = torch.arange(6.0)
    run = ours.microbatch(lambda x: (x.sum(), x), 0, 2, (mb.AccumulationType.SUM, mb.AccumulationType.CONCAT))
    part = ours.microbatch(
        lambda x: (x.sum(), x),
        0,
        2,
        (mb.AccumulationType.SUM, mb.AccumulationType.CONCAT),
        num_real_microbatches=torch.tensor(2),
    )
    assert float(run(x)[0]) == 15 and torch.equal(run(x)[1], x)
    # rows 0, 3 and 1, 4
    assert float(part(x)[0]) == 8 and torch.equal(part(x)[1], torch.tensor([0.0, 1.0, 0.0, 3.0, 4.0, 0.0]))


def test_an_accumulator_of_ones_own_is_used() -> None:
    greatest = mb.Accumulator(
        init=lambda x: torch.full_like(x, -torch.inf),
        update=lambda carry, x, i: torch.maximum(carry, x),
        finalize=lambda carry: carry,
        aggregate=lambda x: x.amax(0),
    )
    x = torch.tensor([3.0, 9.0, -1.0, 4.0])
    assert float(ours.microbatch(lambda x: x.max(), 0, 2, greatest)(x)) == 9
    assert float(mb.micro_vmap(lambda x: x + 1, microbatch_size=2, accumulator=greatest)(x)) == 10


def test_what_does_not_fit_is_named() -> None:
    fun, x = (lambda x: x["a"].sum()), {"a": torch.arange(6)}
    for call, error, message in [
        (lambda: ours.microbatch(fun, 0, 4)(x), ValueError, "a: 6 rows are no multiple of microbatch_size=4"),
        (lambda: ours.microbatch(fun, 0, 2, mb.AccumulationType.MEAN)(x), ValueError, "for a mean, came torch.int64"),
        (lambda: ours.microbatch(fun, 0, 2, (mb.AccumulationType.SUM,) * 2)(x), ValueError, "has 2 parts where"),
        (lambda: ours.microbatch(fun, 0, 2, "sum")(x), TypeError, "expected an Accumulator .*, came 'sum'"),
        (
            lambda: ours.microbatch(fun, 0, 2)(x | {"b": torch.ones(4)}),
            ValueError,
            r"one number of rows, came \[4, 6\]",
        ),
        (lambda: mb.micro_vmap(fun, out_axes=1), ValueError, "expected out_axes=0, came 1"),
    ]:
        with pytest.raises(error, match=message):
            call()


def test_a_microbatched_function_compiles_to_one_graph() -> None:
    run = ours.microbatch(
        lambda x: (torch.sin(x).sum(), x), 0, 2, (mb.AccumulationType.SUM, mb.AccumulationType.CONCAT)
    )
    x = torch.linspace(0, 1, 6)
    torch._dynamo.reset()
    assert tree.allclose(torch.compile(run, fullgraph=True, backend="eager")(x), run(x), rtol=0, atol=0)
