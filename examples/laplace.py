"""Laplace approximations: how sure is a network where it saw no data? 90 % intervals, and how many points are inside.

python examples/laplace.py

Source: MacKay 1992, "Bayesian interpolation"; Immer et al. 2021 (arXiv:2104.04975) for networks.
"""

import math

import torch

import functrain as ft
from functrain.curvature import laplace

POINTS, WIDTH, NOISE = 80, 32, 0.1
keys = ft.random.split(ft.random.key(0), 6)


def draw(key, low, high):
    """Return points whose x is between `low` and `high` from 0, on either side."""
    a, b, c = ft.random.split(key, 3)
    x = ft.random.uniform(a, (POINTS, 1), minval=low, maxval=high) * (2 * ft.random.bernoulli(b, 0.5, (POINTS, 1)) - 1)
    return {"x": x, "y": torch.sin(2 * x) + 0.5 * x + NOISE * ft.random.normal(c, (POINTS, 1))}


def outputs_fn(params, batch, key=None):
    h = batch["x"]
    for layer in params[:-1]:
        h = torch.tanh(ft.nn.linear(h, **layer))  # (B, WIDTH)
    return ft.nn.linear(h, **params[-1])  # (B, 1)


def loss_of_outputs(z, batch):
    losses = ft.losses.l2_loss(z, batch["y"]) / NOISE**2 + math.log(NOISE * math.sqrt(2 * math.pi))
    return ft.Loss(torch.sum(losses), losses.new_full((), len(losses)), {})  # minus the log likelihood


def loss_fn(params, batch, key):
    data, prior = batch
    loss = loss_of_outputs(outputs_fn(params, data), data)
    return loss._replace(total=loss.total + prior / 2 * ft.tree.vdot(params, params))


sizes = [1, WIDTH, WIDTH, 1]
params = [
    {"weight": ft.random.normal(key, (m, n)) / math.sqrt(m), "bias": torch.zeros(n)}
    for key, m, n in zip(keys, sizes[:-1], sizes[1:], strict=False)
]
train, near, between = draw(keys[3], 1.0, 3.0), draw(keys[4], 1.0, 3.0), draw(keys[5], 0.0, 1.0)
optimizer = ft.optim.adam(ft.schedules.cosine_decay_schedule(1e-2, 1500))
step = ft.compile(ft.train_step(loss_fn, optimizer), donate=True)
prior = torch.ones(())
for _ in range(3):  # the network under a prior, then the prior that the network makes likely
    state = ft.init_state(params, optimizer, key=keys[0])
    for _ in range(1500):
        state, _ = step(state, (train, prior))
    params = ft.tree.map(torch.clone, state.params)
    posterior = laplace.full_ggn(outputs_fn, loss_of_outputs, params, [train], prior_precision=prior)
    prior = laplace.maximize_evidence(posterior).prior_precision
    print(f"prior precision {prior.item():.2f}, evidence {laplace.log_marginal_likelihood(posterior).item():.1f}")

fits = {
    "all parameters": posterior,
    "last layer": laplace.full_ggn(outputs_fn, loss_of_outputs, params, [train], where="2/*", prior_precision=prior),
    "diagonal": laplace.diagonal_ggn(outputs_fn, loss_of_outputs, params, [train], prior_precision=prior),
}


def inside(data, mean, variance):
    return torch.mean((torch.abs(data["y"] - mean) < 1.645 * torch.sqrt(variance + NOISE**2)).float()).item()


def show(name, of):
    found = [inside(data, *of(data)) for data in (near, between)]
    print(f"{name:14} near the data {found[0]:.2f}, between {found[1]:.2f}")


show("noise alone", lambda data: (outputs_fn(params, data), torch.zeros(())))
for name, fit in fits.items():
    predicted = {id(data): laplace.predict(outputs_fn, fit, data) for data in (near, between)}
    show(name, lambda data, p=predicted: (p[id(data)].mean, p[id(data)].covariance[:, 0]))
