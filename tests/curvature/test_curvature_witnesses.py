"""Curvature beside jax and scipy: one random problem in float64, with a scalar, an empty leaf and a masked example."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from later import Later
from torch import Tensor

import functrain as ft
from functrain import curvature, tree
from functrain.compiler.compilation import interpret

jax = Later("jax")
jnp = Later("jax.numpy")
scipy = Later("scipy")
sparse = Later("scipy.sparse.linalg")

CLOSE = {"rtol": 1e-9, "atol": 1e-11}  # float64, some thousand roundings
KINDS = ["squares", "classes"]


@pytest.fixture(autouse=True)
def wide() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PARAMS = {
    "layers": [{"w": draw(0, 3, 4), "b": draw(1, 4)}, {"w": draw(2, 4, 2), "b": draw(3, 2)}],
    "scale": draw(4),
    "empty": draw(5, 0, 2),
}
WEIGHTS = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5], dtype=torch.float64)
BATCH = {"x": draw(6, 5, 3), "y": draw(7, 5, 2), "label": torch.tensor([0, 1, 1, 0, 1]), "weight": WEIGHTS}
SIZE = tree.size(PARAMS)


def like(vector: Any) -> Any:
    leaves, structure = tree.flatten(PARAMS)
    parts = torch.split(torch.as_tensor(vector), [leaf.numel() for leaf in leaves])
    return tree.unflatten(structure, [part.view(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])


def flat(t: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in tree.leaves(t)])


V = like(draw(8, SIZE))


def outputs(params: Any, batch: Any, key: Any = None) -> Any:
    """For tensors and for jax's arrays."""
    first, last = params["layers"]
    z = batch["x"] @ first["w"] + first["b"]
    tanh = torch.tanh if isinstance(z, Tensor) else jnp.tanh
    return tanh(z) @ last["w"] * params["scale"] + last["b"]  # (B, 2)


def of_outputs(kind: str) -> Callable[[Tensor, Any], ft.Loss]:
    def loss(z: Tensor, batch: Any) -> ft.Loss:
        if kind == "squares":
            losses = torch.sum(ft.losses.l2_loss(z, batch["y"]), -1)
        else:
            losses = ft.losses.softmax_cross_entropy_with_integer_labels(z, batch["label"])
        return ft.Loss(torch.sum(losses * batch["weight"]), torch.sum(batch["weight"]), {})

    return loss


def loss_fn(kind: str) -> Callable[..., ft.Loss]:
    return lambda params, batch, key=None: of_outputs(kind)(outputs(params, batch), batch)


def theirs(t: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf.numpy()), t)


def their_losses(kind: str, z: Any, batch: Any) -> Any:
    if kind == "squares":
        return 0.5 * jnp.sum((z - batch["y"]) ** 2, -1) * batch["weight"]
    picked = jnp.take_along_axis(jax.nn.log_softmax(z), batch["label"][:, None], 1)[:, 0]
    return -picked * batch["weight"]


def their_mean(kind: str) -> Callable[[Any], Any]:
    batch = theirs(BATCH)
    return lambda params: jnp.sum(their_losses(kind, outputs(params, batch), batch)) / jnp.sum(batch["weight"])


def their_hessian(kind: str) -> np.ndarray:
    vector, back = jax.flatten_util.ravel_pytree(theirs(PARAMS))
    return np.array(jax.hessian(lambda v: their_mean(kind)(back(v)))(vector))


def assert_equal(got: Any, want: Any, **close: float) -> None:
    np.testing.assert_allclose(flat(got).numpy(), np.array(jax.flatten_util.ravel_pytree(want)[0]), **(close or CLOSE))


@pytest.mark.parametrize("kind", KINDS)
def test_hvp_is_that_of_jax(kind: str) -> None:
    params, v = theirs(PARAMS), theirs(V)
    want = jax.jvp(jax.grad(their_mean(kind)), (params,), (v,))[1]
    product = lambda params, v: ft.hvp(loss_fn(kind), params, BATCH, v)  # noqa: E731
    assert_equal(product(PARAMS, V), want)
    assert_equal(interpret(product)(PARAMS, V), want)
    np.testing.assert_allclose(flat(product(PARAMS, V)).numpy(), their_hessian(kind) @ flat(V).numpy(), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_ggnvp_is_jaxs_jvp_hessian_and_vjp(kind: str) -> None:
    params, v, batch = theirs(PARAMS), theirs(V), theirs(BATCH)
    z, push = jax.jvp(lambda p: outputs(p, batch), (params,), (v,))
    mean = lambda z: jnp.sum(their_losses(kind, z, batch)) / jnp.sum(batch["weight"])  # noqa: E731
    curved = jax.jvp(jax.grad(mean), (z,), (push,))[1]
    want = jax.vjp(lambda p: outputs(p, batch), params)[1](curved)[0]
    product = lambda params, v: ft.ggnvp(outputs, of_outputs(kind), params, BATCH, v)  # noqa: E731
    assert_equal(product(PARAMS, V), want)
    assert_equal(interpret(product)(PARAMS, V), want)


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_is_jaxs_mean_of_outer_products(kind: str) -> None:
    batch = theirs(BATCH)
    vector, back = jax.flatten_util.ravel_pytree(theirs(PARAMS))

    def losses(v: Any) -> Any:
        return their_losses(kind, outputs(back(v), batch), batch)

    rows = np.array(jax.jacobian(losses)(vector))  # (B, n)
    product = lambda params, v: curvature.fisher_vp(loss_fn(kind), params, BATCH, v)  # noqa: E731
    want = rows.T @ (rows @ flat(V).numpy()) / int(torch.count_nonzero(WEIGHTS))  # others are no examples
    for got in (product(PARAMS, V), interpret(product)(PARAMS, V)):
        np.testing.assert_allclose(flat(got).numpy(), want, **CLOSE)


def test_conjugate_gradients_are_those_of_jax_and_scipy() -> None:
    product = lambda v: ft.ggnvp(outputs, of_outputs("squares"), PARAMS, BATCH, v)  # noqa: E731
    damped = lambda v: tree.add_scale(product(v), 0.3, v)  # noqa: E731
    matrix = torch.stack([flat(damped(like(row))) for row in torch.eye(SIZE, dtype=torch.float64)]).numpy()
    b = flat(V).numpy()
    # the same iterates, a few roundings apart: 4 steps are far from the solution
    want = jax.scipy.sparse.linalg.cg(lambda v: jnp.asarray(matrix) @ v, jnp.asarray(b), maxiter=4, tol=0.0)[0]
    few = curvature.conjugate_gradients(product, V, steps=4, damping=0.3)
    np.testing.assert_allclose(flat(few.x).numpy(), np.array(want), **CLOSE)
    residual = np.linalg.norm(b - matrix @ flat(few.x).numpy())
    assert float(few.residual_norm) == pytest.approx(residual, rel=1e-8) and residual > 1e-3
    operator = sparse.LinearOperator(matrix.shape, lambda v: flat(damped(like(v))).numpy(), dtype=np.float64)
    solved, failed = sparse.cg(operator, b, rtol=1e-14, atol=0.0)
    assert failed == 0
    full = curvature.conjugate_gradients(product, V, steps=2 * SIZE, damping=0.3, tolerance=1e-14)
    np.testing.assert_allclose(flat(full.x).numpy(), solved, **CLOSE)
    traced = interpret(lambda v: tuple(curvature.conjugate_gradients(product, v, steps=4, damping=0.3)))(V)
    np.testing.assert_allclose(flat(traced[0]).numpy(), flat(few.x).numpy(), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_lanczos_finds_the_eigenpairs_of_scipy(kind: str) -> None:
    product = lambda v: ft.hvp(loss_fn(kind), PARAMS, BATCH, v)  # noqa: E731
    operator = sparse.LinearOperator((SIZE, SIZE), lambda v: flat(product(like(v))).numpy(), dtype=np.float64)
    values, vectors = sparse.eigsh(operator, 4, which="LA", v0=flat(V).numpy(), tol=1e-13)
    found = curvature.lanczos(product, V, steps=SIZE)
    np.testing.assert_allclose(found.values[-4:].numpy(), values, **CLOSE)
    np.testing.assert_allclose(found.values.numpy(), np.linalg.eigvalsh(their_hessian(kind)), rtol=1e-8, atol=1e-10)
    for i in range(1, 5):
        ours, their = flat(tree.map(lambda leaf, i=i: leaf[-i], found.vectors)).numpy(), vectors[:, -i]
        assert abs(ours @ their) == pytest.approx(1.0, abs=1e-10)
        assert float(found.weights[-i]) == pytest.approx((their @ flat(V).numpy()) ** 2 / float(flat(V) @ flat(V)))
    traced = interpret(lambda v: tuple(curvature.lanczos(product, v, steps=5)))(V)
    few = curvature.lanczos(product, V, steps=5)
    torch.testing.assert_close(traced[0], few.values, **CLOSE)
    mapped = ft.vmap(lambda v: curvature.lanczos(product, v, steps=5).values)(tree.map(lambda leaf: leaf[None], V))
    torch.testing.assert_close(mapped[0], few.values, **CLOSE)


def test_hutchinsons_errors_have_the_variance_of_signs() -> None:
    a = draw(9, 6, 6)
    matrix = (a + a.T).numpy()
    off = matrix**2 * (1 - np.eye(6))
    keys = ft.random.split(ft.random.key(0), 4000)
    m = torch.as_tensor(matrix)

    def one(key: Tensor) -> tuple[Tensor, Tensor]:
        found = curvature.hutchinson(lambda v: m @ v, m[0], key, samples=1)
        return found.trace, found.diagonal

    traces, diagonals = ft.vmap(one)(keys)
    # an error of the mean of 4000 is 1 in 63 standard deviations, of a variance about 1 in 45: 4 of them
    assert abs(float(traces.mean()) - np.trace(matrix)) < 4 * np.sqrt(2 * off.sum() / 4000)
    assert float(traces.var()) == pytest.approx(2 * off.sum(), rel=0.1)
    assert np.all(np.abs(diagonals.mean(0).numpy() - np.diag(matrix)) < 4 * np.sqrt(off.sum(1) / 4000))
    np.testing.assert_allclose(diagonals.var(0).numpy(), off.sum(1), rtol=0.1)


def logistic(w: Any, strength: Any, x: Any, y: Any, weight: Any) -> Any:
    margins = (x @ w) * y
    log1p = torch.nn.functional.softplus(-margins) if isinstance(margins, Tensor) else jax.nn.softplus(-margins)
    return (log1p * weight).sum() + 0.5 * strength * (w**2).sum()


X, Y, COUNTED = draw(10, 12, 3), torch.sign(draw(11, 12)), torch.tensor([1.0] * 8 + [0.0, 2.0, 0.5, 1.0])


def optimum(strength: float, weight: Any) -> np.ndarray:
    """Newton's method, in jax."""
    args = (strength, *theirs((X, Y)), jnp.asarray(weight))
    w = jnp.zeros(3)
    for _ in range(20):
        w = w - jnp.linalg.solve(jax.hessian(logistic)(w, *args), jax.grad(logistic)(w, *args))
    return np.array(w)


def test_implicit_gradients_are_those_of_jax_and_of_finite_differences() -> None:
    strength, cotangent, weight = 0.7, draw(12, 3), COUNTED.double().numpy()
    w = optimum(strength, weight)
    args = (strength, *theirs((X, Y)), jnp.asarray(weight))
    mixed = jax.jacobian(jax.grad(logistic), 1)(jnp.asarray(w), *args)
    want = -cotangent.numpy() @ np.linalg.solve(np.array(jax.hessian(logistic)(jnp.asarray(w), *args)), mixed)

    def loss(w: Any, strength: Any) -> Tensor:
        return logistic(w["w"], strength["s"], X, Y, COUNTED.double())

    argument = {"s": torch.tensor(strength, dtype=torch.float64)}
    of = lambda c: curvature.implicit_grad(loss, {"w": torch.as_tensor(w)}, argument, {"w": c}, steps=6)  # noqa: E731
    np.testing.assert_allclose(of(cotangent)["s"].numpy(), want, **CLOSE)
    np.testing.assert_allclose(interpret(of)(cotangent)["s"].numpy(), want, **CLOSE)
    slope = scipy.optimize.approx_fprime([strength], lambda s: cotangent.numpy() @ optimum(s[0], weight), 1e-6)
    np.testing.assert_allclose(of(cotangent)["s"].numpy(), slope[0], rtol=1e-5)


def test_influence_of_weighted_examples_is_that_of_their_optimum() -> None:
    # no prior in a Loss: the sum of the losses is what is trained, and 12 points in 3 dimensions are not separable
    weight, target = COUNTED.double(), draw(13, 3)
    w = optimum(0.0, weight.numpy())

    def of_examples(w: Tensor, batch: Any, key: Any) -> ft.Loss:
        total = logistic(w, 0.0, batch["x"], batch["y"], batch["weight"])
        return ft.Loss(total, torch.sum(batch["weight"]), {})

    batch = {"x": X, "y": Y, "weight": weight}
    got = curvature.influence(of_examples, torch.as_tensor(w), batch, target, steps=6).numpy()
    args = (0.0, *theirs((X, Y)), jnp.asarray(weight.numpy()))
    hessian = np.array(jax.hessian(logistic)(jnp.asarray(w), *args))
    mixed = np.array(jax.jacobian(jax.grad(logistic), 4)(jnp.asarray(w), *args))  # (3, B)
    want = -target.numpy() @ np.linalg.solve(hessian, mixed) * weight.numpy()
    np.testing.assert_allclose(got, want, **CLOSE)
    assert got[8] == 0.0 and np.all(got[:8] != 0.0)
