"""L-BFGS and line searches: the trajectories of optax, and laws of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from later import Later
from test_optim_parity import Comparison, precision, to_torch

import functrain as ft
import functrain.optim as ours
import functrain.tree as tree

jax = Later("jax")
jnp = Later("jax.numpy")
optax = Later("optax")


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
def test_the_search_is_the_one_of_optax(name: str) -> None:
    with precision("float64"):
        mine, theirs = SEARCHES[name](ours), SEARCHES[name](optax)
        my_fn, their_fn = rosenbrock(torch), rosenbrock(jnp)
        stored = name not in ("none", "backtracking otherwise")
        my_vg = ours.value_and_grad_from_state(my_fn) if stored else None
        both = jax.jit(jax.value_and_grad(their_fn))
        update = jax.jit(lambda g, r, q, v: theirs.update(g, r, q, value=v, grad=g, value_fn=their_fn))
        for seed in range(2):
            draw = np.random.default_rng(seed)
            params = {"x": draw.normal(size=(2,)), "y": draw.normal(size=(2,))}
            p, q = to_torch(params), jax.tree.map(jnp.asarray, params)
            s, r = mine.init(p), theirs.init(q)
            compare = Comparison(1e-10)
            compare("state", s, r)
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

    def step(params: Any, state: Any) -> Any:
        value, grad = ft.value_and_grad(fn)(params)
        updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=fn)
        return ours.apply_updates(params, updates), state

    def go(start: torch.Tensor, step: Any = step) -> Any:
        params = {"x": start, "y": 2 * start}
        return step(*step(params, tx.init(params)))

    starts = torch.tensor([[0.3, -0.4], [1.5, 0.2], [0.0, 2.0]], dtype=torch.float64)
    together = ft.vmap(go)(starts)
    for i, start in enumerate(starts):
        # sums in another order, and a search that divides their differences
        assert tree.allclose(tree.map(lambda x, i=i: x[i], together), go(start), rtol=1e-8, atol=1e-8)
    if name == "backtracking":
        torch._dynamo.reset()
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            compiled = torch.compile(step, fullgraph=True, backend="eager")
            assert tree.allclose(go(starts[0], compiled), go(starts[0]))


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


def quadratic(x: torch.Tensor) -> torch.Tensor:
    return torch.sum(torch.arange(1, 4).to(x.dtype) * x**2)


def quartic(x: torch.Tensor) -> torch.Tensor:
    return torch.sum(torch.arange(1, 4).to(x.dtype) * x**4)


def separable(x: torch.Tensor) -> torch.Tensor:
    rows = ft.random.normal(ft.random.key(1), (8, 3)).to(x.dtype)
    return torch.mean(torch.nn.functional.softplus(-torch.abs(rows @ x)))


@pytest.mark.parametrize(
    ("fn", "size", "dtype", "ours_at"),
    [
        (quadratic, 1.0, torch.float32, 1e-30),
        (quadratic, 1e30, torch.float32, 1e-10),  # the square of a gradient is infinite
        (quadratic, 1.0, torch.float64, 1e-200),
        (quartic, 1.0, torch.float32, 1e-35),
        (separable, 1.0, torch.float32, 1e-30),
    ],
)
def test_lbfgs_stays_where_it_has_converged(fn: Any, size: float, dtype: torch.dtype, ours_at: float) -> None:
    tx, params = ours.lbfgs(memory_size=2), torch.ones(3, dtype=dtype)
    state = tx.init(params)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return size * fn(x)

    for _ in range(300):
        value, grad = ft.value_and_grad(loss)(params)
        updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        params = ours.apply_updates(params, updates)
        assert params.isfinite().all() and state[0].weights_memory.isfinite().all()
    assert float(loss(params)) <= ours_at
