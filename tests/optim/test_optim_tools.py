"""What optax has beside transformations: linear algebra, scaled gradients, params in states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from later import Later
from test_optim_laws import examples
from test_optim_parity import CASES, Case

import functrain as ft
import functrain.optim as ours
import functrain.tree as tree

jax = Later("jax")
jnp = Later("jax.numpy")
optax = Later("optax")

law = settings(deadline=None, derandomize=True, max_examples=5, database=None)


def positive(n: int, seed: int) -> np.ndarray:
    """Draw a symmetric matrix with eigenvalues from 0.5 to about 5."""
    x = np.random.default_rng(seed).normal(size=(n, n)).astype(np.float32)
    return x @ x.T / n + 0.5 * np.eye(n, dtype=np.float32)


# ---- linear algebra -------------------------------------------------------------------------------------------------


@law
@given(n=st.integers(1, 5), seed=st.integers(0, 99))
def test_power_iteration_finds_what_optax_and_eigh_find(n: int, seed: int) -> None:
    matrix = positive(n, seed)
    value, vector = ours.power_iteration(torch.from_numpy(matrix), num_iters=40)
    theirs, their_vector = optax.power_iteration(jnp.asarray(matrix), num_iters=40)
    # products of two libraries differ by roundings of 6e-8, and an eigenvector by them over the gap of eigenvalues
    np.testing.assert_allclose(value, theirs, rtol=1e-5)
    np.testing.assert_allclose(vector, their_vector, atol=1e-3)
    exact = ours.power_iteration(torch.from_numpy(matrix).double(), num_iters=2000, error_tolerance=1e-9)[0]
    # the value converges as the square of the vector does
    torch.testing.assert_close(exact, torch.linalg.eigvalsh(torch.from_numpy(matrix).double())[-1], rtol=1e-9, atol=0)


def test_power_iteration_takes_products_of_trees() -> None:
    def product(v: Any) -> Any:
        return {"a": 3 * v["a"] + v["b"].sum(), "b": v["b"] + v["a"]}

    value, vector = ours.power_iteration(product, v0={"a": torch.tensor(1.0), "b": torch.ones(2)})
    torch.testing.assert_close(product(vector), tree.scale(value, vector), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="pass v0"):
        ours.power_iteration(product)
    with pytest.raises(ValueError, match=r"expected a square matrix \(n, n\), came \(2, 3\)"):
        ours.power_iteration(torch.ones(2, 3))


@law
@given(n=st.integers(1, 4), p=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99))
def test_an_inverse_root_is_that_of_optax(n: int, p: int, seed: int) -> None:
    matrix = positive(n, seed)
    root, error = ours.matrix_inverse_pth_root(torch.from_numpy(matrix), p)
    theirs, _ = optax.matrix_inverse_pth_root(jnp.asarray(matrix), p)
    # converged to 1e-6 of the identity
    np.testing.assert_allclose(root, theirs, rtol=0, atol=2e-5)
    assert float(error) < 1e-5


@pytest.mark.parametrize("p", [1, 3, 5])
def test_an_inverse_root_to_the_power_is_the_inverse(p: int) -> None:
    matrix = torch.from_numpy(positive(4, 1)).double()
    root, _ = ours.matrix_inverse_pth_root(matrix, p, ridge_epsilon=0.0, error_tolerance=1e-13)
    # eigenvalues from 0.5 to 5: a condition of 10 on roundings of 1e-16
    torch.testing.assert_close(torch.linalg.matrix_power(root, -p), matrix, rtol=1e-9, atol=1e-9)


@law
@given(m=st.integers(1, 4), n=st.integers(1, 4), k=st.sampled_from([None, 2]), seed=st.integers(0, 99))
def test_nnls_is_that_of_optax_and_of_scipy(m: int, n: int, k: int | None, seed: int) -> None:
    draw = np.random.default_rng(seed)
    a = draw.normal(size=(m, n)).astype(np.float32)
    b = draw.normal(size=(m,) if k is None else (m, k)).astype(np.float32)
    x = ours.nnls(torch.from_numpy(a), torch.from_numpy(b), 50)
    # 50 steps of a few roundings of 6e-8, of values of about 1
    np.testing.assert_allclose(x, optax.nnls(jnp.asarray(a), jnp.asarray(b), 50), atol=1e-4)
    assert (x >= 0).all()
    bounded = ours.nnls(torch.from_numpy(a), torch.from_numpy(b), 50, L=float(np.sum(a**2)) + 1.0)
    theirs = optax.nnls(jnp.asarray(a), jnp.asarray(b), 50, L=float(np.sum(a**2)) + 1.0)
    np.testing.assert_allclose(bounded, theirs, atol=1e-4)


def test_nnls_solves_the_example_and_refuses_shapes() -> None:
    a = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    # of optax's documentation
    torch.testing.assert_close(
        ours.nnls(a, torch.tensor([5.0, 6.0]), 1000), torch.tensor([0.0, 1.7]), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(ours.nnls(0 * a, torch.ones(2), 3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"came \(2, 2\) and \(3,\)"):
        ours.nnls(a, torch.ones(3), 3)


def test_an_iteration_is_the_same_vmapped_and_compiled() -> None:
    matrices = torch.stack([torch.from_numpy(positive(3, seed)) for seed in range(3)])

    def both(matrix: torch.Tensor) -> Any:
        eigenvalue, _ = ours.power_iteration(matrix, num_iters=8)
        return eigenvalue, ours.nnls(matrix, matrix[0], 4)

    alone = [both(matrix) for matrix in matrices]
    together = torch.func.vmap(both)(matrices)
    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="eager")
    for i, expected in enumerate(alone):
        # sums in another order: a few roundings of 6e-8 in eight products
        torch.testing.assert_close(tuple(x[i] for x in together), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(compiled(matrices[i]), expected, rtol=1e-5, atol=1e-6)


# ---- scaled gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.5, torch.tensor(0.3)])
def test_scale_gradient_changes_the_gradient_alone(scale: Any) -> None:
    x = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor(float("inf"))}
    assert tree.allclose(ours.scale_gradient(x, scale), x, rtol=0, atol=0)

    def cube(v: torch.Tensor) -> torch.Tensor:
        return (ours.scale_gradient(v, scale) ** 3).sum()

    v = torch.tensor([1.0, -2.0, 0.5])
    expected = 3 * v**2 * scale
    assert torch.allclose(torch.func.grad(lambda v: cube(v) + 0 * v.sum())(v), expected)
    if float(scale):
        assert torch.allclose(ft.grad(cube)(v), expected)
        torch.testing.assert_close(
            torch.func.vmap(torch.func.grad(cube))(v.unsqueeze(1)).squeeze(1), expected, rtol=1e-6, atol=0
        )
        theirs = jax.grad(lambda v: (optax.scale_gradient(v, float(scale)) ** 3).sum())(jnp.asarray(v.numpy()))
        np.testing.assert_allclose(expected, theirs, rtol=1e-6)
        torch._dynamo.reset()
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            compiled = torch.compile(ft.grad(cube), fullgraph=True, backend="aot_eager")
            assert torch.allclose(compiled(v), expected)


# ---- params in states -----------------------------------------------------------------------------------------------


# these keep tuples, one tensor for each dimension of a leaf, and so want tuples in `rest`
TUPLES = {"sm3", "scale_by_sm3", "soap", "scale_by_soap", "kron", "scale_by_kron"}


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in TUPLES], ids=lambda case: case.name)
def test_the_params_of_every_state_are_found(case: Case) -> None:
    params = {"b": [torch.ones(2, 3), torch.ones(3)], "a": torch.ones(2, 2)}
    names = {"b": ["b/0", "b/1"], "a": "a"}
    for what in examples(case, 1):
        tx = what.build("ours")
        state = tx.init(params)
        seen: list[str] = []

        def note(leaf: Any, name: Any, seen: list[str] = seen) -> Any:
            seen.append(name)
            return leaf + 0

        mapped = ours.tree_map_params(tx, note, state, names)
        tree.check_same_structure(state, mapped)
        assert set(seen) <= {"b/0", "b/1", "a"}
        # what ends with the path of a parameter stands for it
        assert len([path for path in tree.paths(state) if path.endswith(("/b/0", "/b/1", "/a"))]) == len(seen)


def test_f_gets_the_leaf_and_the_rest_and_others_are_transformed() -> None:
    params = {"w": torch.ones(2), "b": torch.ones(3)}
    tx = ours.chain(ours.clip_by_global_norm(1.0), ours.masked(ours.adam(0.1), {"w": True, "b": False}))
    state = tx.init(params)
    placed = ours.tree_map_params(
        tx, lambda leaf, name: name, state, {"w": "row", "b": "all"}, transform_non_params=lambda _: "one"
    )
    assert dict(tree.items(placed)) == {
        "1/inner_state/0/count": "one",
        "1/inner_state/0/mu/w": "row",
        "1/inner_state/0/nu/w": "row",
    }
    seen = ours.tree_map_params(
        tx.init,
        lambda leaf, name: f"{type(leaf).__name__} {name}",
        state,
        {"w": "row", "b": "all"},
        is_leaf=lambda v: isinstance(v, ours.MaskedNode),
    )
    assert tree.at(seen, "1/inner_state/0/mu") == {"w": "Tensor row", "b": "MaskedNode all"}


def test_a_state_of_another_transformation_is_refused_by_path() -> None:
    params = {"w": torch.ones(2)}
    with pytest.raises(ValueError, match="tree_map_params: 0: expected ScaleByAdamState"):
        ours.tree_map_params(ours.adam(0.1), lambda x: x, ours.sgd(0.1, 0.9).init(params))
    with pytest.raises(ValueError, match=r"mu/w: expected list with 1 leaves in each tree of rest, came Tensor"):
        ours.tree_map_params(ours.sm3(0.1), lambda x, y: x, ours.sm3(0.1).init(params), params)
    with pytest.raises(ValueError, match=r"tree_map_params: 0/mu: expected dict with 1 leaves in each tree of rest"):
        ours.tree_map_params(ours.adam(0.1), lambda x, y: x, ours.adam(0.1).init(params), [1])
