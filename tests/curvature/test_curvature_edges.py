"""Laws of curvature at its edges: mixed dtypes, sizes near the ends of float32, what is no vector or no tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import functrain as ft
from functrain import curvature, tree

WIDE = torch.float64


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE)


def outputs(params: Any, batch: Any, key: Tensor | None = None) -> Tensor:
    return torch.tanh(batch["x"] @ params["body"].to(WIDE)) @ params["head"].to(WIDE)  # (B,)


def of_outputs(z: Tensor, batch: Any) -> ft.Loss:
    return ft.Loss(torch.sum((z - batch["y"]) ** 2) / 2, z.new_full((), len(z)), {})


def loss_fn(params: Any, batch: Any, key: Tensor | None = None) -> ft.Loss:
    return of_outputs(outputs(params, batch), batch)


PARAMS = {"body": draw(0, 3, 4), "head": draw(1, 4)}
BATCH = {"x": draw(2, 6, 3), "y": draw(3, 6)}
V = {"body": draw(4, 3, 4), "head": draw(5, 4)}


def narrow(t: Any) -> Any:
    return {"body": t["body"].float(), "head": t["head"]}


@pytest.mark.parametrize("vector", ["mixed", "narrow", "wide"])
def test_params_of_two_dtypes_have_a_fisher_and_an_influence(vector: str) -> None:
    casts = {"mixed": narrow, "narrow": lambda t: tree.cast(t, torch.float32), "wide": lambda t: t}
    params, v = narrow(PARAMS), casts[vector](V)

    def found(params: Any, v: Any) -> tuple[Any, Tensor]:
        fisher = curvature.fisher_vp(loss_fn, params, BATCH, v)
        return fisher, curvature.influence(loss_fn, params, BATCH, v, steps=30, damping=50.0)

    fisher, influence = found(params, v)
    assert [leaf.dtype for leaf in tree.leaves(fisher)] == [torch.float32, WIDE]
    want = found(PARAMS, V)
    # float32 rounds params and v to 6e-8, in sums of some dozen
    torch.testing.assert_close(tree.leaves(tree.cast(fisher, WIDE)), tree.leaves(want[0]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(influence.to(WIDE), want[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["tensor", "loss", "metrics"])
def test_an_implicit_gradient_is_that_of_the_mean_loss(kind: str) -> None:
    x, y, c = draw(6, 7, 3), draw(7, 7), draw(8, 3)
    weight, decay = torch.tensor(7.0, dtype=WIDE), torch.tensor(0.3, dtype=WIDE)

    def optimum(a: Any) -> Tensor:
        return torch.linalg.solve(x.T @ x + 7 * a["decay"] * torch.eye(3, dtype=WIDE), x.T @ y)

    def loss(p: Tensor, a: Any) -> Any:
        total = torch.sum((x @ p - y) ** 2) / 2 + 7 * a["decay"] * torch.sum(p**2) / 2 + torch.sum(a["apart"])
        return {"tensor": total / 7, "loss": ft.Loss(total, weight, {}), "metrics": (total / 7, {"n": weight})}[kind]

    argument = {"decay": decay, "apart": draw(9, 2)}
    got = curvature.implicit_grad(loss, optimum(argument), argument, c, steps=5)
    want = ft.grad(lambda a: optimum(a) @ c)(argument)
    assert tree.allclose(got, want, rtol=1e-9, atol=1e-12)
    # of what the optimum does not depend on
    apart = lambda p, a: loss(p, {"decay": decay, "apart": a})  # noqa: E731
    assert torch.equal(
        curvature.implicit_grad(apart, optimum(argument), argument["apart"], c, steps=5), torch.zeros(2, dtype=WIDE)
    )


def solved(matvec: Any, like: Any) -> Any:
    return curvature.conjugate_gradients(matvec, like, steps=2)


def eigenpairs(matvec: Any, like: Any) -> Any:
    return curvature.lanczos(matvec, like, steps=2)


def estimated(matvec: Any, like: Any) -> Any:
    return curvature.hutchinson(matvec, like, ft.random.key(0), samples=2)


@pytest.mark.parametrize("function", [solved, eigenpairs, estimated])
def test_what_is_no_vector_of_the_matrix_is_named(function: Any) -> None:
    with pytest.raises(TypeError, match="n: expected a floating-point tensor, came torch.int64"):
        function(lambda v: v, {"a": torch.ones(3), "n": torch.tensor([1, 2])})
    with pytest.raises(ValueError, match=r"a product: a: expected shape \(3,\).*came \(3, 1\)"):
        function(lambda v: {"a": v["a"][:, None]}, {"a": torch.ones(3)})


def test_what_an_influence_does_not_take_is_named() -> None:
    with pytest.raises(TypeError, match="influence.*body: expected a floating-point tensor, came torch.int64"):
        curvature.influence(loss_fn, PARAMS, BATCH, tree.map(lambda leaf: leaf.long(), V), steps=2, damping=50.0)
    with pytest.raises(ValueError, match=r"influence: rate: expected a tensor of \(B, \.\.\.\), came \(\)"):
        curvature.influence(loss_fn, PARAMS, {"rate": torch.ones(())} | BATCH, V, steps=2, damping=50.0)


@pytest.mark.parametrize("power", [-80, -50, 70, 120])
def test_conjugate_gradients_do_not_depend_on_the_scale_of_the_right_side(power: int) -> None:
    """Its square would be below or above all float32 numbers, and the solution zero; the matrix is not singular."""
    q = torch.linalg.qr(draw(10, 10, 10))[0]
    matrix = ((q * torch.logspace(0, -3, 10, dtype=WIDE)) @ q.T).float()
    b, scale = {"a": draw(11, 4).float() / 1e5, "b": draw(12, 2, 3).float() / 1e5}, 2.0**power

    def matvec(v: Any) -> Any:
        product = matrix @ torch.cat([v["a"], v["b"].flatten()])
        return {"a": product[:4], "b": product[4:].view(2, 3)}

    one = curvature.conjugate_gradients(matvec, b, steps=30)
    other = curvature.conjugate_gradients(matvec, tree.scale(scale, b), steps=30)
    assert other.positive
    assert all(tree.leaves(tree.map(torch.equal, other.x, tree.scale(scale, one.x))))
    assert torch.equal(other.residual_norm, scale * one.residual_norm)
    want = torch.linalg.solve(matrix.double(), torch.cat([b["a"], b["b"].flatten()]).double())
    # an epsilon of 6e-8 times the condition number of 1e3, some ten times
    torch.testing.assert_close(
        torch.cat([one.x["a"], one.x["b"].flatten()]).double(), want, rtol=0, atol=1e-3 * want.norm().item()
    )


def test_outputs_that_are_not_one_tensor_are_named() -> None:
    def several(params: Any, batch: Any, key: Tensor | None = None) -> Any:
        return {"z": outputs(params, batch)}

    def of_several(z: Any, batch: Any) -> ft.Loss:
        return of_outputs(z["z"], batch)

    with pytest.raises(TypeError, match="ggnvp: expected outputs_fn to return one floating-point tensor, came a dict"):
        ft.ggnvp(several, of_several, PARAMS, BATCH, V)  # type: ignore[arg-type]
    posterior = curvature.laplace.full_ggn(outputs, of_outputs, PARAMS, [BATCH])
    for call in (
        lambda: curvature.laplace.diagonal_ggn(several, of_several, PARAMS, [BATCH]),  # type: ignore[arg-type]
        lambda: curvature.laplace.predict(several, posterior, BATCH),
    ):
        with pytest.raises(TypeError, match="laplace: expected outputs_fn to return one.*came a dict"):
            call()


@pytest.mark.parametrize("fit", [curvature.laplace.full_ggn, curvature.laplace.diagonal_ggn])
def test_outputs_narrower_than_the_parameters_have_a_posterior(fit: Any) -> None:
    def single(params: Any, batch: Any, key: Tensor | None = None) -> Tensor:
        return outputs(params, batch).float()

    def of_single(z: Tensor, batch: Any) -> ft.Loss:
        return of_outputs(z, {"y": batch["y"].float()})

    want, got = fit(outputs, of_outputs, PARAMS, [BATCH]), fit(single, of_single, PARAMS, [BATCH])
    # the Hessian in the outputs is one in both, so that only gradients are rounded, to 6e-8
    assert tree.allclose(got.curvature, want.curvature, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"expected a prior_precision of at least 0, came -0\.1"):
        fit(outputs, of_outputs, PARAMS, [BATCH], prior_precision=-0.1)


def decayed(params: Any, decay: Any) -> Tensor:
    return loss_fn(params, BATCH).total + decay * tree.norm(params, squared=True)


@pytest.mark.parametrize("name", ["hvp", "ggnvp", "implicit_grad", "influence"])
def test_autograd_goes_through_the_curvature_of_tensors_that_require_grad(name: str) -> None:
    calls = {
        "hvp": lambda p, x, v: ft.hvp(loss_fn, p, {"x": x, "y": BATCH["y"]}, v),
        "ggnvp": lambda p, x, v: ft.ggnvp(outputs, of_outputs, p, {"x": x, "y": BATCH["y"]}, v),
        "implicit_grad": lambda p, x, v: curvature.implicit_grad(decayed, p, torch.sum(x**2), v, steps=20),
        "influence": lambda p, x, v: curvature.influence(
            loss_fn, p, {"x": x, "y": BATCH["y"]}, v, steps=20, damping=99.0
        ),
    }

    def size(p: Any, x: Tensor, v: Any) -> Tensor:
        return tree.norm(calls[name](p, x, v), squared=True)

    args = (PARAMS, BATCH["x"], V)
    want = ft.grad(size, argnums=(0, 1, 2))(*args)
    for i in range(3):  # each by itself
        leaves = tree.map(lambda leaf: leaf.clone().requires_grad_(), args[i])
        size(*args[:i], leaves, *args[i + 1 :]).backward()
        assert tree.allclose(tree.map(lambda leaf: leaf.grad, leaves), want[i], rtol=1e-9, atol=1e-12)
