"""Optimizers that look at curvature, or at singular vectors: the trajectories of optax, and laws of their own."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from later import Later
from test_optim_parity import Comparison, numbers, precision, to_torch

import functrain.optim as ours
import functrain.tree as tree

jax = Later("jax")
jnp = Later("jax.numpy")
optax = Later("optax")

# no shrinking: an example may be one more for jax to compile
law = settings(deadline=None, derandomize=True, max_examples=4, database=None, phases=[Phase.generate])
SHAPES = {"b": [(4, 3), (3,)], "a": (), "c": (2, 5)}


def of_both(fn: Any) -> Any:
    """Return a loss of torch's params and one of jax's: the sum of fn over all elements, and a mixed term.

    The term is small beside the diagonal of the Hessian, so that an estimate of that does not cancel.
    """

    def mine(params: Any) -> torch.Tensor:
        total = sum(fn(torch, leaf).sum() for leaf in tree.leaves(params))
        return total + 0.1 * params["a"] * params["b"][1].sum()

    def theirs(params: Any) -> Any:
        total = sum(fn(jnp, leaf).sum() for leaf in jax.tree.leaves(params))
        return total + 0.1 * params["a"] * params["b"][1].sum()

    return mine, theirs


# ---- sophia ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_sophia_makes_the_trajectory_of_optax(dtype: str, tolerance: float) -> None:
    mine_fn, their_fn = of_both(lambda lib, x: lib.sqrt(1 + x * x) + x * x)

    @functools.partial(jax.jit, static_argnames="clip_threshold")
    def their_update(numbers: Any, clip_threshold: float | None, g: Any, r: Any, q: Any) -> Any:
        # numbers are traced, so that jax compiles once for all examples
        return optax.contrib.sophia(**numbers, clip_threshold=clip_threshold).update(g, r, q, obj_fn=their_fn)

    @law
    @given(
        seed=st.integers(0, 99),
        draw=st.fixed_dictionaries(
            dict(
                learning_rate=st.sampled_from([0.1, 0.003]),
                b1=st.sampled_from([0.9, 0.5]),
                b2=st.sampled_from([0.9, 0.5]),
                gamma=st.sampled_from([0.01, 0.5]),
                update_interval=st.integers(1, 4),
                weight_decay=st.sampled_from([0.0, 0.1]),
                eps=st.sampled_from([1e-3, 1e-2]),
            )
        ),
        clip_threshold=st.sampled_from([None, 0.2]),
    )
    def holds(seed: int, draw: dict[str, Any], clip_threshold: float | None) -> None:
        with precision(dtype):
            compare = Comparison(tolerance)
            params = jax.tree.map(lambda x: x.clip(-2, 2), numbers(SHAPES, seed, dtype))
            mine, theirs = (f(**draw, clip_threshold=clip_threshold) for f in (ours.sophia, optax.contrib.sophia))
            p, q = to_torch(params), jax.tree.map(jnp.asarray, params)
            s, r = mine.init(p), theirs.init(q)
            for step in range(10):
                grads = numbers(SHAPES, 1000 * seed + step, dtype)
                u, s = mine.update(to_torch(grads), s, p, obj_fn=mine_fn)
                v, r = their_update(draw, clip_threshold, jax.tree.map(jnp.asarray, grads), r, q)
                p, q = ours.apply_updates(p, u), optax.apply_updates(q, v)
                compare("updates", u, v)
                compare("params", p, q)
                compare("mu", s[0].mu, r[0].mu)
                compare("nu", s[0].nu, r[0].nu)
                key = jax.random.key_data(r[0].hessian_fn_state.key).view(jnp.int32)
                assert s[0].hessian_fn_state.key.tolist() == key.tolist()

    holds()


def test_the_estimate_of_a_diagonal_hessian_is_exact() -> None:
    params = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
    tx = ours.hutchinson_estimator_diag_hessian()
    diagonal, state = tx.update(params, tx.init(params), params, obj_fn=lambda p: (p["w"] ** 3).sum() + p["b"] ** 2)
    assert torch.allclose(diagonal["w"], 6 * params["w"]) and torch.allclose(diagonal["b"], torch.tensor(2.0))
    assert not torch.equal(state.key, tx.init(params).key)
    with pytest.raises(ValueError, match="obj_fn=lambda params"):
        tx.update(params, state, params)


def test_sophia_vmapped_and_compiled_is_sophia() -> None:
    tx = ours.sophia(torch.tensor(0.1), update_interval=2)
    fn, _ = of_both(lambda lib, x: lib.sqrt(1 + x * x) + x * x)

    start = to_torch(numbers(SHAPES, 3, "float32"))

    def turn(params: Any, state: Any, step: torch.Tensor) -> Any:
        grads = tree.map(lambda p: torch.cos(7 * p + step), params)
        updates, state = tx.update(grads, state, params, obj_fn=fn)
        return ours.apply_updates(params, updates), state

    def go(scale: torch.Tensor, turn: Any = turn) -> Any:
        params = tree.map(lambda x: x * scale, start)
        state = tx.init(params)
        for step in range(3):
            params, state = turn(params, state, torch.tensor(step))
        return params, state

    scales = torch.tensor([0.5, 1.0])
    together = torch.func.vmap(go)(scales)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True, error_on_recompile=True):
        compiled = go(scales[1], torch.compile(turn, fullgraph=True, backend="eager"))
    for got in (tree.map(lambda x: x[1], together), compiled):
        # reductions add in another order: a few roundings of 6e-8
        assert tree.allclose(got, go(scales[1]), rtol=1e-5, atol=1e-6)


# ---- galore ---------------------------------------------------------------------------------------------------------


class WideNumpy:
    """What jax.numpy is to optax's galore, whose singular vectors have the roundings of float32 in float64 too."""

    float32 = np.dtype("float64")

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)


def apart(g: np.ndarray) -> np.ndarray:
    """Return a matrix with the singular vectors of g and the singular values 4, 3, ..., whose gaps are no roundings."""
    if g.ndim != 2:
        return g
    u, _, vh = np.linalg.svd(g, full_matrices=False)
    return np.asarray((u * np.arange(4, 4 - u.shape[1], -1)) @ vh, g.dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_galore_makes_the_trajectory_of_optax(dtype: str, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    if dtype == "float64":
        monkeypatch.setattr(optax.contrib._galore, "jnp", WideNumpy())

    @law
    @given(
        seed=st.integers(0, 99),
        draw=st.fixed_dictionaries(
            dict(
                learning_rate=st.sampled_from([0.1, 0.003]),
                rank=st.integers(1, 5),
                update_proj_gap=st.just(20),
                scale=st.sampled_from([1.0, 0.25]),
                weight_decay=st.sampled_from([0.0, 0.1]),
            )
        ),
        wide=st.booleans(),
    )
    def holds(seed: int, draw: dict[str, Any], wide: bool) -> None:
        # signs of singular vectors are free: adam is odd in each element, so that updates do not depend on them as long
        # as the vectors stay
        with precision(dtype):
            shapes = {"w": (4, 3), "v": (2, 5), "t": (2, 2, 3), "b": (3,)}
            dims = dict(w=(0, 1), v=(0, 1), t=((0, 2), 1), b=None) if wide else None

            def numbered(kind: Any) -> Any:
                return dims and {name: None if d is None else kind(*d) for name, d in dims.items()}

            draw_mine = draw | dict(base_optimizer=ours.scale_by_adam(eps=1e-3))
            draw_theirs = draw | dict(base_optimizer=optax.scale_by_adam(eps=1e-3))
            mine = ours.galore(**draw_mine, weight_dimension_numbers=numbered(ours.GaLoreDimensionNumbers))
            theirs = optax.contrib.galore(
                **draw_theirs, weight_dimension_numbers=numbered(optax.contrib.GaLoreDimensionNumbers)
            )
            compare = Comparison(tolerance)
            params = numbers(shapes, seed, dtype)
            p, q = to_torch(params), jax.tree.map(jnp.asarray, params)
            s, r = mine.init(p), theirs.init(q)
            update = jax.jit(theirs.update)
            for step in range(10):
                grads = jax.tree.map(apart, numbers(shapes, 1000 * seed + step, dtype))
                u, s = mine.update(to_torch(grads), s, p)
                v, r = update(jax.tree.map(jnp.asarray, grads), r, q)
                p, q = ours.apply_updates(p, u), optax.apply_updates(q, v)
                compare("updates", u, v)
                compare("params", p, q)
            assert [tuple(x.shape) for x in tree.leaves(s[0])] == [x.shape for x in jax.tree.leaves(r[0])]
            assert int(s[0].count) == 10 == int(r[0].count)

    holds()


def test_galore_finds_its_dimensions_when_they_are_due() -> None:
    tx = ours.scale_by_galore(rank=1, update_proj_gap=2, base_optimizer=ours.identity())
    state, projectors = tx.init({"w": torch.zeros(4, 3)}), []
    for step in range(4):
        grads = to_torch(numbers({"w": (4, 3)}, step, "float64"))
        updates, state = tx.update(grads, state)
        projectors.append(state.projector["w"])
        if step % 2 == 0:
            u, s, vh = torch.linalg.svd(grads["w"])
            best = s[0] * torch.outer(u[:, 0], vh[0])
            torch.testing.assert_close(updates["w"], best, rtol=1e-9, atol=1e-9)
    assert torch.equal(projectors[0], projectors[1]) and torch.equal(projectors[2], projectors[3])
    assert not torch.equal(projectors[1], projectors[2])


def test_galore_of_full_rank_with_a_linear_optimizer_is_that_optimizer() -> None:
    grads = to_torch(numbers({"w": (4, 3), "v": (2, 5), "b": (3,)}, 1, "float64"))
    tx = ours.scale_by_galore(rank=9, base_optimizer=ours.trace(0.9))
    plain = ours.trace(0.9)
    s, r = tx.init(grads), plain.init(grads)
    for _ in range(3):
        u, s = tx.update(grads, s)
        v, r = plain.update(grads, r)
        # an orthonormal basis and back: a few roundings of 1e-16
        assert tree.allclose(u, v, rtol=1e-12, atol=1e-12)


def test_galore_says_what_it_cannot_project() -> None:
    params = {"w": torch.ones(2, 3, 4)}
    with pytest.raises(ValueError, match=r"w: expected numbers that name each dimension of \(2, 3, 4\)"):
        ours.scale_by_galore(weight_dimension_numbers=ours.GaLoreDimensionNumbers(0, 1)).init(params)
    with pytest.raises(ValueError, match="a rank of at least 1, came 0"):
        ours.scale_by_galore(rank=0)
    state = ours.scale_by_galore(rank=2).init({"w": torch.ones(6, 3), "b": torch.ones(3)})
    assert state.projector["w"].shape == (6, 2) and state.base_optimizer_state.mu["w"].shape == (2, 3)
    assert np.prod(state.projector["b"].shape) == 0 and state.base_optimizer_state.mu["b"].shape == (3,)
