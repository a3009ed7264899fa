"""Laplace approximations beside what is known in closed form: linear regression, Hessians, integrals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from later import Later
from torch import Tensor
from torch.distributions import MultivariateNormal

import functrain as ft
from functrain import tree
from functrain.compiler.compilation import interpret
from functrain.curvature import laplace

scipy = Later("scipy")

CLOSE = {"rtol": 1e-9, "atol": 1e-11}  # float64, some thousand roundings
KEY = ft.random.key(0)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flat(t: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in tree.leaves(t)])


def number(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


# ---- linear regression, of which everything is known ----------------------------------------------------------------

X = draw(0, 12, 3)
DESIGN = torch.cat([torch.ones(12, 1, dtype=torch.float64), X], 1)  # in the order of the leaves
Y = DESIGN @ draw(20, 4) + 0.5 * draw(1, 12)
BATCHES = [{"x": X[:5], "y": Y[:5]}, {"x": X[5:], "y": Y[5:]}]


def line(params: Any, batch: Any, key: Tensor | None = None) -> Tensor:
    return batch["x"] @ params["slope"] + params["bias"]  # (B,)


def gaussian(noise: Tensor | float) -> Any:
    """Minus the log likelihood of errors of this variance, with its constants."""
    variance = torch.as_tensor(noise, dtype=torch.float64)

    def loss(z: Tensor, batch: Any) -> ft.Loss:
        losses = (z - batch["y"]) ** 2 / (2 * variance) + torch.log(2 * math.pi * variance) / 2
        return ft.Loss(torch.sum(losses), losses.new_full((), len(losses)), {})

    return loss


def optimum(noise: Tensor | float, prior: Tensor | float) -> dict[str, Tensor]:
    eye = torch.eye(4, dtype=torch.float64)
    w = torch.linalg.solve(DESIGN.T @ DESIGN / noise + prior * eye, DESIGN.T @ Y / noise)
    return {"bias": w[0], "slope": w[1:]}


def evidence(noise: Tensor | float, prior: Tensor | float) -> Tensor:
    """The logarithm of the density of Y with the parameters integrated out."""
    covariance = noise * torch.eye(12, dtype=torch.float64) + DESIGN @ DESIGN.T / prior
    return MultivariateNormal(torch.zeros(12, dtype=torch.float64), covariance).log_prob(Y)


def fitted(noise: Tensor | float, prior: Tensor | float, **options: Any) -> laplace.Full:
    params = optimum(noise, prior)
    return laplace.full_ggn(line, gaussian(noise), params, BATCHES, prior_precision=prior, **options)


def test_the_posterior_of_a_linear_model_is_the_exact_one() -> None:
    posterior = fitted(0.3, 0.7)
    precision = DESIGN.T @ DESIGN / 0.3 + 0.7 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(posterior.curvature, DESIGN.T @ DESIGN / 0.3, **CLOSE)
    assert torch.equal(posterior.curvature, posterior.curvature.T)
    new = torch.cat([torch.ones(6, 1, dtype=torch.float64), draw(2, 6, 3)], 1)
    found = laplace.predict(line, posterior, {"x": new[:, 1:]}, chunk_size=4)
    mean = torch.linalg.solve(precision, DESIGN.T @ Y / 0.3)
    torch.testing.assert_close(found.mean[:, 0], new @ mean, **CLOSE)
    variance = torch.einsum("bi,ij,bj->b", new, torch.linalg.inv(precision), new)
    torch.testing.assert_close(found.covariance[:, 0, 0], variance, **CLOSE)


@pytest.mark.parametrize(("noise", "prior"), [(0.3, 0.7), (2.0, 1e-6), (0.01, 1e6)])
def test_the_marginal_likelihood_of_a_linear_model_is_the_exact_evidence(noise: float, prior: float) -> None:
    torch.testing.assert_close(laplace.log_marginal_likelihood(fitted(noise, prior)), evidence(noise, prior), **CLOSE)


def test_the_marginal_likelihood_has_the_derivatives_of_the_evidence() -> None:
    # at the optimum the parameters themselves add nothing to the derivative
    params = optimum(0.3, 0.7)

    def ours(noise: Tensor, prior: Tensor) -> Tensor:
        found = laplace.full_ggn(line, gaussian(noise), params, BATCHES, prior_precision=prior)
        return laplace.log_marginal_likelihood(found)

    got = ft.grad(ours, argnums=(0, 1))(number(0.3), number(0.7))
    want = ft.grad(evidence, argnums=(0, 1))(number(0.3), number(0.7))
    torch.testing.assert_close(got, want, **CLOSE)


def test_training_under_the_prior_that_is_found_finds_the_maximum_of_the_evidence() -> None:
    prior = number(1.0)
    for _ in range(40):
        prior = laplace.maximize_evidence(fitted(0.3, prior), steps=5).prior_precision
    best = scipy.optimize.minimize_scalar(lambda log: -float(evidence(0.3, math.exp(log))), bounds=(-5, 5))
    assert float(torch.log(prior)) == pytest.approx(best.x, abs=1e-4)  # the search's own tolerance is 1e-5
    assert float(evidence(0.3, prior)) >= -best.fun - 1e-12


def test_samples_have_the_posteriors_mean_and_covariance() -> None:
    full = fitted(0.3, 0.7)
    diagonal = laplace.diagonal_ggn(line, gaussian(0.3), optimum(0.3, 0.7), BATCHES, prior_precision=0.7)
    assert float(torch.corrcoef(full.curvature)[0, 1].abs()) > 0.1
    exact = torch.linalg.inv(full.curvature + 0.7 * torch.eye(4, dtype=torch.float64))
    alone = torch.diag(1 / (torch.diagonal(full.curvature) + 0.7))
    keys = ft.random.split(KEY, 20_000)
    for posterior, covariance in ((full, exact), (diagonal, alone)):
        rows = ft.vmap(lambda k, p=posterior: flat(laplace.sample(p, k)))(keys)  # (20000, 4)
        mean = flat(posterior.mean)
        scale = torch.sqrt(torch.diagonal(covariance))
        # 20,000 samples: an error of the mean of 1 in 141, of a correlation of 1 in 141, each times 4
        assert torch.all(torch.abs(rows.mean(0) - mean) < 4 * scale / 141)
        assert torch.all(torch.abs(torch.cov(rows.T) - covariance) < 6 * scale[:, None] * scale / 141)


# ---- a network ------------------------------------------------------------------------------------------------------

PARAMS = {
    "body": {"w": draw(3, 3, 4), "b": draw(4, 4), "scale": number(0.8), "empty": draw(5, 0, 2)},
    "head": {"w": draw(6, 4, 3), "b": draw(7, 3)},
}
WEIGHT = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5, 1.0, 1.0], dtype=torch.float64)
DATA = {"x": draw(8, 7, 3), "label": torch.tensor([0, 1, 2, 0, 1, 1, 2]), "weight": WEIGHT}


def network(params: Any, batch: Any, key: Tensor | None = None) -> Tensor:
    body, head = params["body"], params["head"]
    return torch.tanh(batch["x"] @ body["w"] + body["b"]) * body["scale"] @ head["w"] + head["b"]  # (B, 3)


def classes(z: Tensor, batch: Any) -> ft.Loss:
    losses = ft.losses.softmax_cross_entropy_with_integer_labels(z, batch["label"])
    return ft.Loss(torch.sum(losses * batch["weight"]), torch.sum(batch["weight"]), {})


def loss_fn(params: Any, batch: Any, key: Tensor | None = None) -> ft.Loss:
    return classes(network(params, batch), batch)


def unflat(vector: Tensor, t: Any) -> Any:
    leaves, structure = tree.flatten(t)
    parts = torch.split(vector, [leaf.numel() for leaf in leaves])
    return tree.unflatten(structure, [part.view(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])


def parts(data: Any, *sizes: int) -> list[Any]:
    cut = {name: torch.split(leaf, sizes) for name, leaf in data.items()}
    return [{name: pieces[i] for name, pieces in cut.items()} for i in range(len(sizes))]


def test_a_last_layers_curvature_is_the_hessian_of_the_loss() -> None:
    posterior = laplace.full_ggn(network, classes, PARAMS, parts(DATA, 3, 4), where="head/*", chunk_size=2)
    total = lambda v: loss_fn(PARAMS | {"head": unflat(v, PARAMS["head"])}, DATA).total  # noqa: E731
    torch.testing.assert_close(posterior.curvature, torch.func.hessian(total)(flat(PARAMS["head"])), **CLOSE)
    torch.testing.assert_close(posterior.loss, loss_fn(PARAMS, DATA).total, **CLOSE)
    assert tree.paths(posterior.mean) == ["head/b", "head/w"]
    assert len(tree.paths(posterior.fixed)) == 4


def test_logistic_regressions_curvature_is_its_hessian() -> None:
    # one tensor is a tree, and one logit an output
    x, sign = draw(9, 8, 3), torch.sign(draw(10, 8))
    outputs = lambda w, batch, key: batch[0] @ w  # noqa: E731
    loss = lambda z, batch: torch.sum(torch.nn.functional.softplus(-batch[1] * z))  # noqa: E731
    w = draw(11, 3)
    hessian = torch.func.hessian(lambda w: loss(outputs(w, (x, sign), None), (x, sign)))(w)
    full = laplace.full_ggn(outputs, loss, w, [(x, sign)], prior_precision=torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(full.curvature, hessian, **CLOSE)
    diagonal = laplace.diagonal_ggn(outputs, loss, w, [(x, sign)])
    torch.testing.assert_close(diagonal.curvature, torch.diagonal(hessian), **CLOSE)
    found = laplace.predict(outputs, full, (x, sign))
    covariance = torch.linalg.inv(hessian + torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)))
    torch.testing.assert_close(found.covariance[:, 0, 0], torch.einsum("bi,ij,bj->b", x, covariance, x), **CLOSE)


def test_the_diagonal_is_that_of_the_explicit_matrix() -> None:
    jacobian = torch.func.jacrev(lambda v: network(unflat(v, PARAMS), DATA))(flat(PARAMS))  # (B, C, n)
    p = torch.softmax(network(PARAMS, DATA), -1)
    hessian = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) * WEIGHT[:, None, None]  # (B, C, C)
    matrix = torch.einsum("bcn,bcd,bdm->nm", jacobian, hessian, jacobian)
    fit = lambda params: laplace.diagonal_ggn(network, classes, params, parts(DATA, 3, 4), chunk_size=2)  # noqa: E731
    torch.testing.assert_close(flat(fit(PARAMS).curvature), torch.diagonal(matrix), **CLOSE)
    torch.testing.assert_close(flat(interpret(lambda p: fit(p).curvature)(PARAMS)), torch.diagonal(matrix), **CLOSE)
    everything = laplace.full_ggn(network, classes, PARAMS, [DATA])
    torch.testing.assert_close(everything.curvature, matrix, **CLOSE)
    found = laplace.predict(network, fit(PARAMS), DATA)
    covariance = torch.einsum("bcn,n,bdn->bcd", jacobian, 1 / (torch.diagonal(matrix) + 1), jacobian)
    torch.testing.assert_close(found.covariance, covariance, **CLOSE)
    torch.testing.assert_close(found.mean, network(PARAMS, DATA), **CLOSE)
    traced = interpret(lambda p: tuple(laplace.predict(network, laplace.full_ggn(network, classes, p, [DATA]), DATA)))
    torch.testing.assert_close(traced(PARAMS), tuple(laplace.predict(network, everything, DATA)), **CLOSE)


def test_the_fisher_diagonal_is_the_sum_of_squared_gradients() -> None:
    rows = torch.func.jacrev(
        lambda v: ft.losses.softmax_cross_entropy_with_integer_labels(network(unflat(v, PARAMS), DATA), DATA["label"])
    )(flat(PARAMS))  # (B, n)
    found = laplace.diagonal_fisher(loss_fn, PARAMS, parts(DATA, 3, 4), chunk_size=2)
    torch.testing.assert_close(flat(found.curvature), torch.sum((rows * WEIGHT[:, None]) ** 2, 0), **CLOSE)
    torch.testing.assert_close(found.loss, loss_fn(PARAMS, DATA).total, **CLOSE)
    head = laplace.diagonal_fisher(loss_fn, PARAMS, [DATA], where=["head/w"])
    torch.testing.assert_close(head.curvature["head"]["w"], found.curvature["head"]["w"], **CLOSE)
    assert tree.paths(head.mean) == ["head/w"]
    # a mean of one example is its loss
    mean = lambda params, batch, key: loss_fn(params, batch).total / 1.0  # noqa: E731
    assert tree.allclose(laplace.diagonal_fisher(mean, PARAMS, [DATA]).curvature, found.curvature)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
@pytest.mark.parametrize("structure", ["one", "leaves", "elements"])
def test_the_prior_that_is_found_maximizes_the_marginal_likelihood(kind: str, structure: str) -> None:
    fit = laplace.diagonal_ggn if kind == "diagonal" else laplace.full_ggn
    posterior = fit(network, classes, PARAMS, [DATA], where=["head/*", "body/b"])
    if structure == "leaves":
        posterior = posterior._replace(prior_precision=tree.map(lambda leaf: number(3.0), posterior.mean))
    elif structure == "elements":
        posterior = posterior._replace(prior_precision=tree.ones_like(posterior.mean))
    found = laplace.maximize_evidence(posterior, steps=50)

    def likelihood(logs: Any) -> Tensor:
        return laplace.log_marginal_likelihood(posterior._replace(prior_precision=tree.map(torch.exp, logs)))

    logs = tree.map(torch.log, found.prior_precision)
    slope = ft.grad(likelihood)(logs)
    assert float(tree.norm(slope)) < 1e-10  # and it is concave there, so that this is the maximum
    hessian = torch.func.hessian(lambda v: likelihood(unflat(v, logs)))(flat(logs))
    assert float(torch.linalg.eigvalsh(hessian)[-1]) < 0
    # each step halves the distance at least
    near, far = (laplace.maximize_evidence(posterior, steps=n).prior_precision for n in (9, 8))
    distances = [float(tree.norm(tree.sub(tree.map(torch.log, p), logs))) for p in (near, far)]
    assert distances[0] <= 0.5 * distances[1] + 1e-13


def test_a_leaf_of_zeros_ends_at_the_bound() -> None:
    params = tree.set_at(PARAMS, "head/b", torch.zeros(3, dtype=torch.float64))
    posterior = laplace.diagonal_ggn(network, classes, params, [DATA])
    posterior = posterior._replace(prior_precision=tree.map(lambda leaf: number(1.0), posterior.mean))
    prior = laplace.maximize_evidence(posterior).prior_precision
    assert float(prior["head"]["b"]) == pytest.approx(1e12) and float(prior["head"]["w"]) < 1e3
    assert float(prior["body"]["empty"]) == 1.0  # it has no say


def test_moderated_odds_are_close_to_the_mean_ones() -> None:
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-(grid**2) / 2)
    density = density / density.sum()
    for mean in (-2.0, 0.0, 0.5, 3.0):
        for variance in (0.0, 0.5, 4.0, 25.0):
            exact = torch.sum(density * torch.sigmoid(mean + math.sqrt(variance) * grid))
            prediction = laplace.Prediction(number(mean).view(1, 1), number(variance).view(1, 1, 1))
            found = torch.sigmoid(laplace.moderate(prediction))[0, 0]
            assert abs(float(found - exact)) < (1e-12 if variance == 0 else 0.02)  # 0.02: MacKay 1992, figure 1


def test_a_posterior_is_a_tree_that_is_saved_and_loaded(tmp_path: Path) -> None:
    posterior = laplace.full_ggn(network, classes, PARAMS, [DATA], where="head/*")
    ft.checkpoint.save(tmp_path / "posterior", posterior)
    again = ft.checkpoint.load(tmp_path / "posterior", like=posterior)
    assert isinstance(again, laplace.Full)
    drawn, other = laplace.sample(posterior, KEY), laplace.sample(again, KEY)
    assert tree.allclose(drawn, other, 0.0, 0.0)
    assert drawn["body"]["w"] is posterior.fixed["body"]["w"] and not torch.equal(
        drawn["head"]["w"], PARAMS["head"]["w"]
    )


def test_parameters_in_bfloat16_have_a_posterior_in_float32() -> None:
    params, data = tree.cast(PARAMS, torch.bfloat16), tree.cast(DATA, torch.bfloat16)
    low = laplace.full_ggn(network, classes, params, [data], where="head/*")
    assert low.curvature.dtype == torch.float32
    high = laplace.full_ggn(network, classes, PARAMS, [DATA], where="head/*")
    torch.testing.assert_close(low.curvature.double(), high.curvature, rtol=0.0, atol=0.02)  # 3 digits of at most 1
    assert laplace.sample(low, KEY)["head"]["w"].dtype == torch.bfloat16
    assert laplace.maximize_evidence(low).prior_precision.dtype == torch.float32


def test_what_is_wrong_is_named() -> None:
    fit = laplace.diagonal_ggn
    with pytest.raises(TypeError, match="expected several batches, came one, a dict; pass"):
        fit(network, classes, PARAMS, DATA)
    with pytest.raises(ValueError, match="expected at least one batch, came none"):
        fit(network, classes, PARAMS, [])
    with pytest.raises(tree.PathError, match="tail"):
        fit(network, classes, PARAMS, [DATA], where="tail/*")
    with pytest.raises(ValueError, match="`where` to choose at least one leaf"):
        fit(network, classes, PARAMS, [DATA], where=lambda path, leaf: False)
    with pytest.raises(ValueError, match=r"laplace: x: expected a tensor of \(3, ...\), came \(7, 3\)"):
        fit(network, classes, PARAMS, [{"x": DATA["x"], "label": DATA["label"][:3]}])
    with pytest.raises(ValueError, match=r"body/b: expected a shape that broadcasts to \(4,\), came \(2,\)"):
        fit(network, classes, PARAMS, [DATA], prior_precision=torch.ones(2))
    with pytest.raises(ValueError, match="laplace: prior_precision: expected one structure"):
        fit(network, classes, PARAMS, [DATA], where="head/*", prior_precision=tree.ones_like(PARAMS))
    with pytest.raises(ValueError, match="maximize_evidence: expected steps of at least 1, came 0"):
        laplace.maximize_evidence(fit(network, classes, PARAMS, [DATA]), steps=0)
    with pytest.raises(ValueError, match="laplace: expected chunk_size >= 1 or None, came 0"):
        fit(network, classes, PARAMS, [DATA], chunk_size=0)
    concave = laplace.full_ggn(line, lambda z, batch: -torch.sum(z**2), optimum(0.3, 0.7), BATCHES)
    with pytest.raises(ValueError, match="expected a positive definite precision of the posterior"):
        laplace.sample(concave, KEY)
    assert torch.isnan(ft.vmap(lambda k: laplace.sample(concave, k)["slope"])(KEY[None])).all()
