"""Optimizers that look at curvature, or at singular vectors: the trajectories of optax, and laws of their own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_optim_parity import Comparison, numbers, precision, to_torch

import functrain as ft
import functrain.optim as ours
import functrain.tree as tree

# no shrinking: jax compiles every example anew
law = settings(deadline=None, derandomize=True, max_examples=4, database=None, phases=[Phase.generate])
SHAPES = {"b": [(4, 3), (3,)], "a": (), "c": (2, 5)}


def of_both(fn: Any) -> Any:
    """Return a loss of torch's params and one of jax's: the sum of fn over all elements, and a mixed term."""

    def mine(params: Any) -> torch.Tensor:
        total = sum(fn(torch, leaf).sum() for leaf in tree.leaves(params))
        return total + params["a"] * params["b"][1].sum()

    def theirs(params: Any) -> Any:
        total = sum(fn(jnp, leaf).sum() for leaf in jax.tree.leaves(params))
        return total + params["a"] * params["b"][1].sum()

    return mine, theirs


# ---- sophia ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-10)])
def test_sophia_makes_the_trajectory_of_optax(dtype: str, tolerance: float) -> None:
    @law
    @given(
        seed=st.integers(0, 99),
        draw=st.fixed_dictionaries(
            dict(
                learning_rate=st.sampled_from([0.1, 0.003]),
                b1=st.sampled_from([0.9, 0.5]),
                b2=st.sampled_from([0.9, 0.5]),
                gamma=st.sampled_from([0.01, 0.5]),
                clip_threshold=st.sampled_from([None, 0.2, 1.0]),
                update_interval=st.integers(1, 4),
                weight_decay=st.sampled_from([0.0, 0.1]),
                eps=st.sampled_from([1e-3, 1e-2]),
            )
        ),
    )
    def holds(seed: int, draw: dict[str, Any]) -> None:
        mine_fn, their_fn = of_both(lambda lib, x: lib.sqrt(1 + x * x) + x * x)
        with precision(dtype):
            # an estimate is a sum of parts of the Hessian with signs, which cancel: some ten roundings of 6e-8 each
            compare = Comparison(tolerance)
            params = jax.tree.map(lambda x: x.clip(-2, 2), numbers(SHAPES, seed, dtype))
            mine, theirs = ours.sophia(**draw), optax.contrib.sophia(**draw)
            p, q = to_torch(params), jax.tree.map(jnp.asarray, params)
            s, r = mine.init(p), theirs.init(q)
            their_update = jax.jit(lambda g, r, q: theirs.update(g, r, q, obj_fn=their_fn))
            for step in range(10):
                grads = numbers(SHAPES, 1000 * seed + step, dtype)
                u, s = mine.update(to_torch(grads), s, p, obj_fn=mine_fn)
                v, r = their_update(jax.tree.map(jnp.asarray, grads), r, q)
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

    def go(scale: torch.Tensor) -> Any:
        params = tree.map(lambda x: x * scale, start)
        state = tx.init(params)
        for step in range(3):
            grads = tree.map(lambda p, step=step: torch.cos(7 * p + step), params)
            updates, state = tx.update(grads, state, params, obj_fn=fn)
            params = ours.apply_updates(params, updates)
        return params, state

    scales = torch.tensor([0.5, 1.0])
    together = torch.func.vmap(go)(scales)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(go, fullgraph=True, backend="eager")(scales[1])
    for got in (tree.map(lambda x: x[1], together), compiled):
        # reductions add in another order: a few roundings of 6e-8
        assert tree.allclose(got, go(scales[1]), rtol=1e-5, atol=1e-6)


# ---- galore ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-4)])
def test_galore_makes_the_trajectory_of_optax(dtype: str, tolerance: float) -> None:
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
                grads = numbers(shapes, 1000 * seed + step, dtype)
                u, s = mine.update(to_torch(grads), s, p)
                v, r = update(jax.tree.map(jnp.asarray, grads), r, q)
                p, q = ours.apply_updates(p, u), optax.apply_updates(q, v)
                # the singular vectors of two libraries differ by roundings over gaps between singular values; optax's
                # are float32 in float64 too
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


# ---- lbfgs and line searches ----------------------------------------------------------------------------------------


def rosenbrock(lib: Any) -> Any:
    def fn(params: Any) -> Any:
        x, y = params["x"], params["y"]
        return lib.sum(100 * (y - x**2) ** 2 + (1 - x) ** 2) + 1.0 * lib.sum(lib.cos(x * y))

    return fn


SEARCHES = {
    "none": (lambda lib: lib.lbfgs(0.01, memory_size=3, linesearch=None)),
    "unscaled": (lambda lib: lib.lbfgs(memory_size=2, scale_init_precond=False)),
    "zoom": (lambda lib: lib.lbfgs()),
    "zoom with a limit": (
        lambda lib: lib.lbfgs(
            memory_size=4,
            linesearch=lib.scale_by_zoom_linesearch(
                6, max_learning_rate=1.5, tol=1e-3, increase_factor=1.7, slope_rtol=1e-3, curv_rtol=0.5,
                approx_dec_rtol=None, stepsize_precision=1e-3, initial_guess_strategy="keep",
            ),
        )
    ),
    "zoom after sgd": (lambda lib: lib.chain(lib.sgd(1.0), lib.scale_by_zoom_linesearch(15))),
    "backtracking": (
        lambda lib: lib.chain(lib.sgd(0.1), lib.scale_by_backtracking_linesearch(15, store_grad=True))
    ),
    "backtracking otherwise": (
        lambda lib: lib.lbfgs(
            memory_size=2,
            linesearch=lib.scale_by_backtracking_linesearch(
                4, slope_rtol=0.1, decrease_factor=0.5, increase_factor=2.0, max_learning_rate=3.0, atol=1e-3, rtol=1e-3
            ),
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_search_is_the_one_of_optax(name: str, seed: int) -> None:
    with precision("float64"):
        draw = np.random.default_rng(seed)
        params = {"x": draw.normal(size=(2,)), "y": draw.normal(size=(2,))}
        mine, theirs = SEARCHES[name](ours), SEARCHES[name](optax)
        my_fn, their_fn = rosenbrock(torch), rosenbrock(jnp)
        p, q = to_torch(params), jax.tree.map(jnp.asarray, params)
        s, r = mine.init(p), theirs.init(q)
        compare = Comparison(1e-10)
        compare("state", s, r)
        stored = name not in ("none", "backtracking otherwise")
        my_vg = ours.value_and_grad_from_state(my_fn) if stored else None
        both = jax.jit(jax.value_and_grad(their_fn))
        update = jax.jit(lambda g, r, q, v: theirs.update(g, r, q, value=v, grad=g, value_fn=their_fn))
        for _ in range(10):
            value, grad = my_vg(p, state=s) if my_vg else ft.value_and_grad(my_fn)(p)
            u, s = mine.update(grad, s, p, value=value, grad=grad, value_fn=my_fn)
            their_value, their_grad = both(q)
            v, r = update(their_grad, r, q, their_value)
            p, q = ours.apply_updates(p, u), optax.apply_updates(q, v)
            compare("updates", u, v)
            compare("params", p, q)
            compare("state", s, r)


def test_a_search_takes_what_the_function_takes_and_nothing_else() -> None:
    def fn(params: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return ((params - x) ** 2).sum()

    for search in (ours.scale_by_zoom_linesearch(10), ours.scale_by_backtracking_linesearch(10, store_grad=True)):
        tx = ours.chain(ours.sgd(1.0), search)
        params, x = torch.ones(2), torch.tensor([3.0, 4.0])
        value, grad = ft.value_and_grad(fn)(params, x)
        updates, state = tx.update(grad, tx.init(params), params, value=value, grad=grad, value_fn=fn, x=x)
        new = ours.apply_updates(params, updates)
        assert fn(new, x) < fn(params, x)
        torch.testing.assert_close(state[1].value, fn(new, x))
        torch.testing.assert_close(state[1].grad, ft.grad(fn)(new, x))
        with pytest.raises(TypeError, match=r"came \['y'\] besides"):
            tx.update(grad, tx.init(params), params, value=value, grad=grad, value_fn=fn, x=x, y=x)
        with pytest.raises(ValueError, match="needs value, grad, value_fn: call update"):
            tx.update(grad, tx.init(params), params)
    with pytest.raises(ValueError, match="a value and a gradient in the state"):
        ours.value_and_grad_from_state(fn)(params, x, state=ours.sgd(0.1).init(params))
    with pytest.raises(ValueError, match="choose initial_guess_strategy 'one' or 'keep', came 'last'"):
        ours.scale_by_zoom_linesearch(3, initial_guess_strategy="last")


def test_a_value_in_the_state_spares_the_gradient() -> None:
    calls = 0

    def fn(params: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return (params**4).sum()

    tx = ours.lbfgs()
    params = torch.tensor([1.0, -2.0])
    state = tx.init(params)
    both = ours.value_and_grad_from_state(fn)
    for step in range(8):
        before = calls
        value, grad = both(params, state=state)
        assert calls - before == (step == 0)
        updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=fn)
        params = ours.apply_updates(params, updates)
        assert calls - before - (step == 0) == int(state[2].info.num_linesearch_steps)
    assert float(fn(params)) < 1e-3


def test_a_direction_without_finite_values_is_not_taken() -> None:
    def fn(params: torch.Tensor) -> torch.Tensor:
        return (params * torch.where(params == 1, 1.0, torch.nan)).sum()

    for search in (ours.scale_by_zoom_linesearch(4), ours.scale_by_backtracking_linesearch(4)):
        params = torch.ones(1)
        updates, state = search.update(
            -params, search.init(params), params, value=torch.tensor(1.0), grad=params, value_fn=fn
        )
        assert torch.equal(updates, torch.zeros(1)) and float(state.learning_rate) == 0.0


@pytest.mark.parametrize("name", ["zoom", "zoom with a limit", "backtracking"])
def test_a_search_vmapped_and_compiled_is_the_search(name: str) -> None:
    make = SEARCHES[name]
    tx = make(ours) if name != "zoom" else ours.lbfgs(memory_size=2, linesearch=ours.scale_by_zoom_linesearch(5))
    fn = rosenbrock(torch)

    def go(start: torch.Tensor) -> Any:
        params = {"x": start, "y": 2 * start}
        state = tx.init(params)
        for _ in range(2):
            value, grad = ft.value_and_grad(fn)(params)
            updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=fn)
            params = ours.apply_updates(params, updates)
        return params, state

    starts = torch.tensor([[0.3, -0.4], [1.5, 0.2], [0.0, 2.0]], dtype=torch.float64)
    together = ft.vmap(go)(starts)
    for i, start in enumerate(starts):
        # sums in another order, and a search that divides their differences
        assert tree.allclose(tree.map(lambda x, i=i: x[i], together), go(start), rtol=1e-8, atol=1e-8)
    if name == "backtracking":
        torch._dynamo.reset()
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            assert tree.allclose(torch.compile(go, fullgraph=True, backend="eager")(starts[0]), go(starts[0]))


def test_lbfgs_with_a_unit_step_equals_that_of_torch() -> None:
    start = torch.tensor([0.8, -0.3, 1.4], dtype=torch.float64)
    scales = torch.tensor([1.0, 3.0, 10.0], dtype=torch.float64)

    def fn(x: torch.Tensor) -> torch.Tensor:
        return (scales * x**2).sum() + (x[0] * x[1]) ** 2

    theirs = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([theirs], lr=1.0, max_iter=6, history_size=4, tolerance_change=0, tolerance_grad=0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = fn(theirs)
        value.backward()
        return value

    optimizer.step(closure)
    tx = ours.lbfgs(1.0, memory_size=4, linesearch=None)
    params, state = start, None
    for step in range(6):
        grad = ft.grad(fn)(params)
        state = tx.init(params) if state is None else state
        updates, state = tx.update(grad, state, params)
        # torch's first step is min(1, 1 / sum of |g|), ours and optax's min(1, 1 / norm of g)
        updates = updates * (grad.norm() / grad.abs().sum()) if step == 0 else updates
        params = ours.apply_updates(params, updates)
    # six steps of quotients of differences
    torch.testing.assert_close(params, theirs.detach(), rtol=1e-9, atol=1e-9)
