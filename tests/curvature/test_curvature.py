"""Laws of curvature: products against explicit matrices, estimates and solutions against closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import functrain as ft
from functrain import curvature, tree
from functrain.compiler.compilation import interpret

KEY = ft.random.key(0)
CLOSE = {"rtol": 1e-9, "atol": 1e-11}  # float64: some thousand roundings


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs(params: Any, batch: Any, key: Tensor | None = None) -> Tensor:
    return torch.tanh(batch["x"] @ params["w"]) @ params["v"] + params["b"]  # (B, 2)


def of_outputs(z: Tensor, batch: Any) -> ft.Loss:
    losses = torch.logsumexp(z, -1) - z.gather(1, batch["y"][:, None])[:, 0]  # (B,)
    return ft.Loss(losses.sum(), losses.new_full((), len(losses)), {})


def loss_fn(params: Any, batch: Any, key: Tensor | None = None) -> ft.Loss:
    return of_outputs(outputs(params, batch), batch)


PARAMS = {"w": draw(0, 3, 2), "v": draw(1, 2, 2), "b": torch.tensor(0.3, dtype=torch.float64)}
BATCH = {"x": draw(2, 6, 3), "y": torch.tensor([0, 1, 1, 0, 1, 0])}
FLAT, STRUCTURE = tree.flatten(PARAMS)
SIZES = [leaf.numel() for leaf in FLAT]


def vector(t: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in tree.leaves(t)])


def like(v: Tensor) -> Any:
    parts = v.split(SIZES)
    return tree.unflatten(STRUCTURE, [part.view(leaf.shape) for part, leaf in zip(parts, FLAT, strict=True)])


def mean(v: Tensor) -> Tensor:
    loss = loss_fn(like(v), BATCH)
    return loss.total / loss.weight


HESSIAN = torch.autograd.functional.hessian(mean, vector(PARAMS))
V = like(draw(3, sum(SIZES)))


def test_hvp_is_the_hessian_times_the_vector() -> None:
    got = ft.hvp(loss_fn, PARAMS, BATCH, V)
    torch.testing.assert_close(vector(got), HESSIAN @ vector(V), **CLOSE)
    scalar = ft.hvp(lambda p, batch, key: mean(vector(p)), PARAMS, BATCH, V)
    torch.testing.assert_close(vector(scalar), HESSIAN @ vector(V), **CLOSE)


def test_ggnvp_is_the_explicit_matrix_times_the_vector() -> None:
    jacobian = torch.autograd.functional.jacobian(lambda v: outputs(like(v), BATCH), vector(PARAMS))  # (B, 2, n)
    p = torch.softmax(outputs(PARAMS, BATCH), -1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]  # (B, 2, 2)
    matrix = torch.einsum("bin,bij,bjm->nm", jacobian, inner, jacobian) / 6
    got = ft.ggnvp(outputs, of_outputs, PARAMS, BATCH, V)
    torch.testing.assert_close(vector(got), matrix @ vector(V), **CLOSE)
    assert not torch.allclose(matrix, HESSIAN)


def test_fisher_is_the_mean_of_outer_products() -> None:
    g = ft.per_example_grad(loss_fn)(PARAMS, BATCH, None)
    rows = torch.cat([leaf.reshape(6, -1) for leaf in tree.leaves(g)], 1)  # (B, n)
    got = curvature.fisher_vp(loss_fn, PARAMS, BATCH, V, chunk_size=4)
    torch.testing.assert_close(vector(got), rows.T @ rows @ vector(V) / 6, **CLOSE)


def test_a_padded_row_is_no_example_of_the_fisher() -> None:
    def masked(params: Any, batch: Any, key: Tensor | None = None) -> ft.Loss:
        losses = batch["mask"] * (batch["x"] @ params) ** 2
        return ft.Loss(torch.sum(losses), torch.sum(batch["mask"]), {})

    p, x = draw(1, 3), draw(2, 5, 3)
    padded = {"x": torch.cat([x, x[:2]]), "mask": torch.tensor([1.0] * 5 + [0.0] * 2)}
    whole = curvature.fisher_vp(masked, p, {"x": x, "mask": torch.ones(5)}, p)
    torch.testing.assert_close(curvature.fisher_vp(masked, p, padded, p), whole, **CLOSE)


@pytest.mark.parametrize("kind", ["hessian", "gauss-newton"])
def test_products_map_and_compile(kind: str) -> None:
    many = torch.stack([draw(i, sum(SIZES)) for i in range(3)])

    def product(v: Tensor) -> Tensor:
        if kind == "hessian":
            return vector(ft.hvp(loss_fn, PARAMS, BATCH, like(v)))
        return vector(ft.ggnvp(outputs, of_outputs, PARAMS, BATCH, like(v)))

    want = torch.stack([product(v) for v in many])
    torch.testing.assert_close(ft.vmap(product)(many), want, **CLOSE)
    torch.testing.assert_close(ft.compile(product)(many[0]), want[0], **CLOSE)


def test_a_compiled_graph_reads_what_a_scatter_wrote() -> None:
    # torch 2.13 runs a loop of this graph before the scatter that it reads: see lowering._writes_in_order
    def both(v: Tensor) -> tuple[Tensor, Tensor]:
        hessian = ft.hvp(loss_fn, PARAMS, BATCH, like(v))
        return vector(hessian), vector(ft.ggnvp(outputs, of_outputs, PARAMS, BATCH, like(v)))

    v = draw(1, sum(SIZES))
    torch.testing.assert_close(ft.compile(both)(v), both(v), **CLOSE)


def positive(n: int, seed: int = 5) -> Tensor:
    a = draw(seed, n, n)
    return a @ a.T + torch.eye(n, dtype=torch.float64)


def product_with(matrix: Tensor) -> Any:
    return lambda v: like(matrix @ vector(v))


@pytest.mark.parametrize("damping", [0.0, 2.5])
def test_conjugate_gradients_solve(damping: float) -> None:
    n = sum(SIZES)
    matrix, b = positive(n), draw(6, n)
    found = curvature.conjugate_gradients(product_with(matrix), like(b), steps=4 * n, damping=damping, tolerance=1e-13)
    want = torch.linalg.solve(matrix + damping * torch.eye(n, dtype=torch.float64), b)
    torch.testing.assert_close(vector(found.x), want, rtol=1e-8, atol=1e-9)  # times the condition number, 100
    assert float(found.residual_norm) <= 1e-13 * float(b.norm())
    # solved in one step, and kept in the others
    assert torch.equal(vector(curvature.conjugate_gradients(lambda v: v, like(b), steps=9).x), b)


def test_lanczos_finds_the_spectrum() -> None:
    n = sum(SIZES)
    found = curvature.lanczos(lambda v: ft.hvp(loss_fn, PARAMS, BATCH, v), V, steps=n)
    torch.testing.assert_close(found.values, torch.linalg.eigvalsh(HESSIAN), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.weights.sum(), torch.ones((), dtype=torch.float64), **CLOSE)
    top = vector(tree.map(lambda leaf: leaf[-1], found.vectors))
    torch.testing.assert_close(HESSIAN @ top, found.values[-1] * top, rtol=1e-7, atol=1e-9)
    few = curvature.lanczos(lambda v: ft.hvp(loss_fn, PARAMS, BATCH, v), V, steps=5)
    torch.testing.assert_close(few.values[-1], found.values[-1], rtol=0.05, atol=0.0)


def test_hutchinson_is_exact_on_a_diagonal_and_close_elsewhere() -> None:
    n = sum(SIZES)
    diagonal = draw(7, n)
    exact = curvature.hutchinson(lambda v: like(diagonal * vector(v)), PARAMS, KEY, samples=1)
    torch.testing.assert_close(vector(exact.diagonal), diagonal, **CLOSE)
    torch.testing.assert_close(exact.trace, diagonal.sum(), **CLOSE)
    assert torch.isnan(exact.trace_error)
    matrix = positive(n)
    found = curvature.hutchinson(product_with(matrix), PARAMS, KEY, samples=400)
    assert abs(float(found.trace - matrix.trace())) < 4 * float(found.trace_error)
    off = matrix - torch.diag(torch.diag(matrix))
    assert float(found.trace_error) == pytest.approx(float(torch.sqrt(2 * (off**2).sum() / 400)), rel=0.2)


def test_an_optimum_of_ridge_regression_has_its_derivative() -> None:
    x, y, strength = draw(8, 9, 4), draw(9, 9), torch.tensor(0.7, dtype=torch.float64)

    def loss(w: Tensor, strength: Tensor) -> Tensor:
        return torch.sum((x @ w - y) ** 2) + strength * torch.sum(w**2)

    def optimum(strength: Tensor) -> Tensor:
        return torch.linalg.solve(x.T @ x + strength * torch.eye(4, dtype=torch.float64), x.T @ y)

    cotangent = draw(10, 4)
    got = curvature.implicit_grad(loss, optimum(strength), strength, cotangent, steps=8)
    want = ft.grad(lambda s: torch.dot(optimum(s), cotangent))(strength)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_influence_is_the_derivative_by_an_examples_weight() -> None:
    x, y, target = draw(11, 9, 4), draw(12, 9), draw(13, 4)

    def optimum(weight: Tensor) -> Tensor:
        return torch.linalg.solve(x.T @ (weight[:, None] * x), x.T @ (weight * y))

    def of_examples(w: Tensor, batch: Any, key: Any) -> ft.Loss:
        errors = batch["x"] @ w - batch["y"]
        return ft.Loss(torch.sum(errors**2), errors.new_full((), len(errors)), {})

    ones = torch.ones(9, dtype=torch.float64)
    got = curvature.influence(of_examples, optimum(ones), {"x": x, "y": y}, target, steps=8)
    want = ft.grad(lambda weight: torch.dot(optimum(weight), target))(ones)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="hvp: v"):
        ft.hvp(loss_fn, PARAMS, BATCH, {"w": PARAMS["w"]})
    with pytest.raises(ValueError, match="conjugate_gradients: expected steps of at least 1, came 0"):
        curvature.conjugate_gradients(lambda v: v, PARAMS, steps=0)
    with pytest.raises(ValueError, match="lanczos: expected at most 11 steps"):
        curvature.lanczos(lambda v: v, PARAMS, steps=12)
    with pytest.raises(ValueError, match="hutchinson: expected samples of at least 1"):
        curvature.hutchinson(lambda v: v, PARAMS, KEY, samples=0)
    with pytest.raises(ValueError, match="lanczos: expected a start that is not zero"):
        curvature.lanczos(lambda v: v, tree.zeros_like(PARAMS), steps=3)


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("hvp: v", lambda v: ft.hvp(loss_fn, PARAMS, BATCH, v)),
        ("ggnvp: v", lambda v: ft.ggnvp(outputs, of_outputs, PARAMS, BATCH, v)),
        ("fisher_vp: v", lambda v: curvature.fisher_vp(loss_fn, PARAMS, BATCH, v)),
        ("influence: test_grad", lambda v: curvature.influence(loss_fn, PARAMS, BATCH, v, steps=1)),
        (
            "implicit_grad: the cotangent",
            lambda v: curvature.implicit_grad(lambda p, b: loss_fn(p, b).total, PARAMS, BATCH, v, steps=1),
        ),
    ],
)
def test_a_vector_of_other_shapes_is_named(what: str, call: Any) -> None:
    with pytest.raises(ValueError, match=rf"{what}: w: expected shape \(3, 2\), as in params, came \(2, 3\)"):
        call(V | {"w": V["w"].T})


# ---- edges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("diagonal", [[1.0, 1, 2, 2, 3, 3], [5.0] * 6, [0.0] * 6, [0.0, 0, 0, 0, 0, -7]])
def test_lanczos_goes_on_where_the_krylov_space_ends(diagonal: list[float]) -> None:
    d = torch.tensor(diagonal, dtype=torch.float64)
    start = draw(20, 6)
    found = curvature.lanczos(lambda v: d * v, start, steps=6)
    torch.testing.assert_close(found.values, torch.sort(d).values, **CLOSE)
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(6, dtype=torch.float64), **CLOSE)
    # the weight of an eigenvalue is the part of the start in its eigenspace, however many vectors span it
    for value in torch.unique(d):
        weight = found.weights[torch.isclose(found.values, value, atol=1e-9)].sum()
        torch.testing.assert_close(weight, torch.sum(start[d == value] ** 2) / torch.sum(start**2), **CLOSE)


def test_conjugate_gradients_stop_where_the_curvature_is_not_positive() -> None:
    d, b = torch.tensor([3.0, 1.0, -1.0], dtype=torch.float64), torch.tensor([1.0, 1.0, 1e-3], dtype=torch.float64)
    found = curvature.conjugate_gradients(lambda v: d * v, b, steps=9)
    assert not found.positive and torch.isfinite(found.x).all()
    before = curvature.conjugate_gradients(lambda v: d * v, b, steps=2)
    assert before.positive and torch.equal(found.x, before.x)  # the third direction is the negative one
    assert curvature.conjugate_gradients(lambda v: d * v, b, steps=9, damping=1.5).positive
    zero = curvature.conjugate_gradients(lambda v: 0 * v, torch.zeros_like(b), steps=2)
    assert zero.positive and torch.equal(zero.x, torch.zeros_like(b))
    assert torch.isnan(curvature.conjugate_gradients(lambda v: v * torch.nan, b, steps=2).x).all()
    # a solution is kept in the steps that are left, though the recurrence goes on far below rounding
    d = torch.tensor([1e-3, 1.0, 1e3])
    kept = curvature.conjugate_gradients(lambda v: d * v, torch.ones(3), steps=300)
    assert kept.positive
    torch.testing.assert_close(kept.x, 1 / d, rtol=1e-3, atol=0.0)  # float32 times the condition number, 1e6, and less


def saddle(params: Any, strength: Tensor) -> Tensor:
    return params[0] ** 2 - params[1] ** 2 + strength * torch.sum(params)


def test_a_hessian_that_is_no_optimums_is_an_error_or_nan() -> None:
    p, strength, v = draw(21, 2), draw(22), torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="implicit_grad: expected a positive definite Hessian"):
        curvature.implicit_grad(saddle, p, strength, v, steps=4)
    with pytest.raises(ValueError, match="influence: expected a positive definite Hessian"):
        curvature.influence(lambda p, batch, key: saddle(p, batch.mean()), p, draw(23, 3), v, steps=4)
    assert torch.isfinite(curvature.implicit_grad(saddle, p, strength, v, steps=4, damping=2.5))
    of = lambda s: curvature.implicit_grad(saddle, p, s, v, steps=4)  # noqa: E731
    assert torch.isnan(ft.vmap(of)(strength[None])).all() and torch.isnan(interpret(of)(strength))


def test_a_loss_without_curvature_has_the_product_zero() -> None:
    zero = ft.hvp(lambda p, batch, key: torch.sum(p["w"]) + p["b"], PARAMS, BATCH, V)
    assert torch.equal(vector(zero), torch.zeros(sum(SIZES), dtype=torch.float64))
    zero = ft.ggnvp(outputs, lambda z, batch: torch.sum(z), PARAMS, BATCH, V)
    assert torch.equal(vector(zero), torch.zeros(sum(SIZES), dtype=torch.float64))
    with pytest.raises(ValueError, match="does not depend on any leaf"):
        ft.hvp(lambda p, batch, key: torch.sum(p["w"].detach()), PARAMS, BATCH, V)


def test_a_loss_with_metrics_is_the_loss() -> None:
    def with_metrics(params: Any, batch: Any, key: Tensor | None = None) -> Any:
        loss = loss_fn(params, batch)
        return loss.total / loss.weight, {"loss": loss.total}

    assert tree.allclose(ft.hvp(with_metrics, PARAMS, BATCH, V), ft.hvp(loss_fn, PARAMS, BATCH, V), 1e-12)
    fisher = curvature.fisher_vp(with_metrics, PARAMS, BATCH, V)
    assert tree.allclose(fisher, curvature.fisher_vp(loss_fn, PARAMS, BATCH, V), 1e-12)
    found, want = (curvature.influence(f, PARAMS, BATCH, V, steps=5, damping=99.0) for f in (with_metrics, loss_fn))
    torch.testing.assert_close(found, want, **CLOSE)


def test_half_precision_is_kept_outside_and_float32_inside() -> None:
    low = tree.cast(V, torch.bfloat16)
    half = lambda v: tree.scale(0.5, v)  # noqa: E731  exact in bfloat16, of which it gets and gives
    assert tree.allclose(curvature.conjugate_gradients(half, low, steps=1).x, tree.scale(2.0, low), 0.0, 0.0)
    ones = curvature.hutchinson(lambda v: v, low, KEY, samples=300)  # a bfloat16 sum of ones ends at 256
    assert tree.allclose(ones.diagonal, tree.ones_like(low), 0.0, 0.0)
    spectrum = curvature.lanczos(half, low, steps=4)
    # a basis of bfloat16 vectors would be orthogonal to 2 digits
    torch.testing.assert_close(spectrum.values, torch.full((4,), 0.5), rtol=5e-3, atol=0.0)
    for product in (
        ft.hvp(loss_fn, tree.cast(PARAMS, torch.bfloat16), tree.cast(BATCH, torch.bfloat16), low),
        ft.ggnvp(outputs, of_outputs, tree.cast(PARAMS, torch.bfloat16), tree.cast(BATCH, torch.bfloat16), low),
        curvature.fisher_vp(loss_fn, tree.cast(PARAMS, torch.bfloat16), tree.cast(BATCH, torch.bfloat16), low),
    ):
        assert all(leaf.dtype == torch.bfloat16 for leaf in tree.leaves(product))


def test_one_scalar_is_a_tree_of_parameters() -> None:
    p, v, batch = draw(24), draw(25), draw(26, 5)
    square = lambda p, batch, key: torch.mean((p * batch) ** 2)  # noqa: E731
    want = 2 * torch.mean(batch**2) * v
    torch.testing.assert_close(ft.hvp(square, p, batch, v), want, **CLOSE)
    z = lambda p, batch, key: p * batch  # noqa: E731
    torch.testing.assert_close(ft.ggnvp(z, lambda z, batch: torch.mean(z**2), p, batch, v), want, **CLOSE)
    gradients = 2 * p * batch**2
    torch.testing.assert_close(curvature.fisher_vp(square, p, batch, v), torch.mean(gradients**2) * v, **CLOSE)
    product = lambda v: ft.hvp(square, p, batch, v)  # noqa: E731
    torch.testing.assert_close(curvature.conjugate_gradients(product, want, steps=1).x, v, **CLOSE)
    torch.testing.assert_close(curvature.lanczos(product, v, steps=1).values[0], want / v, **CLOSE)
    torch.testing.assert_close(curvature.hutchinson(product, p, KEY, samples=1).trace, want / v, **CLOSE)
    got = curvature.influence(square, p, batch, v, steps=1)
    torch.testing.assert_close(got, -gradients * v / (5 * want / v), **CLOSE)
