"""What optax has besides transformations: projections, second derivatives, perturbations, assignments"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from later import Later

import functrain as ft
from functrain import optim, tree

jax = Later("jax")
jnp = Later("jax.numpy")
optax = Later("optax")

# no shrinking: a seed has nothing to shrink
law = settings(deadline=None, derandomize=True, max_examples=3, database=None, phases=[Phase.generate])


def numbers(seed: int) -> Any:
    draw = np.random.default_rng(seed)
    size = draw.choice([0.1, 1.0, 5.0])
    return {n: (draw.normal(size=s) * size).astype(np.float32) for n, s in {"a": (2, 3), "b": (), "c": (4,)}.items()}


def close(mine: Any, theirs: Any, tolerance: float = 2e-6) -> None:
    assert tree.paths(mine) == tree.paths(jax.tree.map(np.asarray, theirs))
    # sums of eleven numbers, each a few roundings of 6e-8, relative to the largest; those drawn are 0.1 and more
    scale = max([0.1, *[np.abs(np.asarray(b)).max(initial=0.0) for b in jax.tree.leaves(theirs)]])
    for a, b in zip(tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a.detach().numpy(), np.asarray(b), rtol=0, atol=tolerance * scale)


def both(t: Any) -> tuple[Any, Any]:
    return jax.tree.map(torch.tensor, t), jax.tree.map(jnp.asarray, t)


# ---- projections --------------------------------------------------------------------------------------------------

P = {
    "projection_non_negative": lambda p, x, a: p.projection_non_negative(x),
    "projection_box": lambda p, x, a: p.projection_box(x, *(full(x, v) for v in (-0.5, 0.7))),
    "projection_simplex": lambda p, x, a: p.projection_simplex(x, 1.5),
    "projection_l1_sphere": lambda p, x, a: p.projection_l1_sphere(x, 0.8),
    "projection_l1_ball": lambda p, x, a: p.projection_l1_ball(x, 3.0),
    "projection_l2_sphere": lambda p, x, a: p.projection_l2_sphere(x, 1.5),
    "projection_l2_ball": lambda p, x, a: p.projection_l2_ball(x, 2.0),
    "projection_linf_ball": lambda p, x, a: p.projection_linf_ball(x, 0.7),
    "projection_vector": lambda p, x, a: p.projection_vector(x, a),
    "projection_hyperplane": lambda p, x, a: p.projection_hyperplane(x, a, 0.5),
    "projection_halfspace": lambda p, x, a: p.projection_halfspace(x, a, -2.0),
}


def full(like: Any, value: float) -> Any:
    return jax.tree.map(lambda x: x * 0 + value, like)


@pytest.mark.parametrize("name", P)
def test_projections_and_their_derivatives_are_those_of_optax(name):
    @law
    @given(st.integers(0, 10**6))
    def check(seed):
        (x, y), (a, b), (w, v) = both(numbers(seed)), both(numbers(seed + 1)), both(numbers(seed + 2))
        project, (out, grads) = P[name], theirs(y, b, v)
        close(project(optim.projections, x, a), out)
        close(ft.grad(lambda t: tree.vdot(project(optim.projections, t, a), w))(x), grads)

    @jax.jit
    def theirs(y, b, v):
        out, pull_back = jax.vjp(lambda t: P[name](optax.projections, t, b), y)
        return out, pull_back(v)[0]

    check()


def test_projections_are_idempotent_and_bounds_may_be_numbers():
    (x, y), (a, _) = both(numbers(3)), both(numbers(4))
    for project in P.values():
        once = project(optim.projections, x, a)
        close(project(optim.projections, once, a), once, 1e-5)
    # optax takes numbers for a tree of one leaf alone
    for leaf, theirs in zip(tree.leaves(x), jax.tree.leaves(y), strict=True):
        close(optim.projections.projection_hypercube(leaf, 0.3), optax.projections.projection_hypercube(theirs, 0.3))
    boxed = optim.projections.projection_box(x, -0.5, torch.tensor(0.7))
    close(boxed, tree.clip(x, -0.5, 0.7))
    close(optim.projections.projection_hypercube(x), tree.clip(x, 0.0, 1.0))
    assert tree.allclose(optim.projections.projection_l1_ball(x, 1e3), x)


def test_projections_compile_and_keep_half_precision():
    x = {"a": torch.randn(3), "b": torch.randn(2).bfloat16()}
    project = torch.compile(optim.projections.projection_l1_ball, fullgraph=True, backend="aot_eager")
    out = project(x)
    assert out["b"].dtype == torch.bfloat16 and tree.allclose(out, optim.projections.projection_l1_ball(x))


# ---- second derivatives -------------------------------------------------------------------------------------------


def loss(params: Any, inputs: Any, targets: Any) -> Any:
    return (((inputs @ params["a"].T) * params["b"]) ** 3 - targets).sum() ** 2 * 0.01


@pytest.mark.filterwarnings("ignore:.*deprecated.*:DeprecationWarning")
def test_second_derivatives_are_those_of_optax():
    (x, y), draw = both(numbers(5)), np.random.default_rng(0)
    inputs, targets, v = (draw.normal(size=s).astype(np.float32) for s in ((5, 3), (5, 2), (11,)))
    here, there = (lambda a: torch.tensor(a)), jnp.asarray
    for name in ("hessian_diag", "fisher_diag"):
        mine = getattr(optim.second_order, name)(loss, x, here(inputs), here(targets))
        theirs = getattr(optax.second_order, name)(loss, y, there(inputs), there(targets))
        close(mine, theirs, 1e-5)
    mine = optim.second_order.hvp(loss, here(v), x, here(inputs), here(targets))
    close(mine, optax.second_order.hvp(loss, there(v), y, there(inputs), there(targets)), 1e-5)
    with pytest.raises(ValueError, match=r"expected v \(11,\), a number for each parameter, came \(3,\)"):
        optim.second_order.hvp(loss, torch.zeros(3), x, here(inputs), here(targets))


# ---- random trees and perturbations -------------------------------------------------------------------------------


def keys() -> tuple[Any, Any]:
    return ft.random.key(7), jax.random.key(7)


def test_random_trees_are_those_of_optax():
    (x, y), (key, jax_key) = both(numbers(1)), keys()
    mine, theirs = optim.split_key_like(key, x), optax.tree.split_key_like(jax_key, y)
    assert [k.tolist() for k in tree.leaves(mine)] == [
        np.asarray(jax.random.key_data(k)).astype(np.int32).tolist() for k in jax.tree.leaves(theirs)
    ]
    close(optim.random_like(key, x), optax.tree.random_like(jax_key, y))
    mine = optim.random_like(key, x, ft.random.uniform, torch.float32)
    close(mine, optax.tree.random_like(jax_key, y, jax.random.uniform, jnp.float32))
    assert optim.split_key_like(key, {}) == {}


@pytest.mark.parametrize("noise", ["Gumbel", "Normal"])
@pytest.mark.parametrize("use_baseline", [True, False])
def test_perturbed_functions_and_their_derivatives_are_those_of_optax(noise, use_baseline):
    (x, y), (key, jax_key) = both(numbers(2)), keys()
    del x["a"], y["a"]

    def make(library: Any, relu: Any) -> Any:
        def fun(t):
            return {"out": relu(t["c"]).sum() * t["b"], "c": t["c"]}

        made = getattr(library.perturbations, noise)()
        return library.perturbations.make_perturbed_fun(fun, 20, 0.5, made, use_baseline)

    mine, theirs = make(optim, torch.relu), jax.jit(make(optax, jax.nn.relu))
    close(mine(key, x), theirs(jax_key, y), 1e-5)
    grads = ft.grad(lambda t: mine(key, t)["out"])(x)
    # a mean of 20 products of numbers of some ten
    close(grads, jax.jit(jax.grad(lambda t: theirs(jax_key, t)["out"]))(y), 1e-4)


def test_the_derivative_of_a_step_is_that_of_its_smoothed_form():
    step = optim.perturbations.make_perturbed_fun(lambda x: (x > 0).float(), 20_000, 0.5, optim.perturbations.Normal())
    slope = ft.grad(lambda x: step(ft.random.key(0), x))(torch.tensor(0.2))
    # the density of a normal of deviation 0.5 at -0.2 is 0.737; 20000 draws have a standard error of 0.01
    assert abs(slope - 0.737) < 0.04


# ---- assignment ---------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=60, database=None)
@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 10**6), st.booleans())
def test_an_assignment_is_the_cheapest_of_all(n, m, seed, ties):
    draw = np.random.default_rng(seed)
    costs = torch.tensor(draw.integers(0, 3, (n, m)) if ties else draw.normal(size=(n, m)))
    rows, columns = optim.assignment.hungarian_algorithm(costs)
    assert rows.tolist() == sorted(set(rows.tolist())) and len(set(columns.tolist())) == len(rows) == min(n, m)
    few, many = sorted((n, m))
    wide = costs if n <= m else costs.T
    best = min(sum(wide[i, p[i]].item() for i in range(few)) for p in itertools.permutations(range(many), few))
    assert abs(costs[rows, columns].sum().item() - best) < 1e-9  # sums of six numbers of order 1


def test_the_assignment_of_optax_costs_as_much():
    costs = np.random.default_rng(0).normal(size=(7, 12)).astype(np.float32)
    i, j = optim.assignment.base_hungarian_algorithm(torch.tensor(costs))
    p, q = optax.assignment.hungarian_algorithm(jnp.asarray(costs))
    assert dict(zip(i.tolist(), j.tolist(), strict=True)) == dict(zip(p.tolist(), q.tolist(), strict=True))
    with pytest.raises(ValueError, match="infinite cost"):
        optim.assignment.hungarian_algorithm(torch.full((2, 2), torch.inf))
    with pytest.raises(ValueError, match="came NaN"):
        optim.assignment.hungarian_algorithm(torch.full((2, 2), torch.nan))
    allowed = torch.tensor([[torch.inf, 1.0], [2.0, torch.inf]])
    assert optim.assignment.hungarian_algorithm(allowed)[1].tolist() == [1, 0]


# ---- a distribution -----------------------------------------------------------------------------------------------


def test_the_normal_distribution_is_that_of_optax():
    loc, scale = np.asarray([1.0, -2.0], np.float32), np.asarray([[0.1], [-0.5]], np.float32)
    mine = optim.multi_normal(torch.tensor(loc), torch.tensor(scale))
    theirs = optax.multi_normal(jnp.asarray(loc), jnp.asarray(scale))
    key, jax_key = keys()
    sample = mine.sample((3,), key)
    close(sample, theirs.sample((3,), jax_key), 1e-5)
    close(mine.log_prob(sample), theirs.log_prob(jnp.asarray(sample.numpy())), 1e-5)
    close(mine.params, theirs.params)
    assert mine.log_scale is mine.params[1]
