"""A learned loss: trained through whole runs, it fits lines to data of which a third is wrong.

python examples/learned_loss.py [--steps 150]

Source: Bechtle et al. 2021 (arXiv:1906.05374), meta-learning via learned loss.
"""

import argparse

import torch

import functrain as ft

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=150)
options = parser.parse_args()
TASKS, POINTS, DIMS, INNER = 32, 40, 5, 20


def draw_tasks(key):
    """Return points whose targets are partly wrong, and points to be tested on, of TASKS linear functions."""
    a, b, c, d = ft.random.split(key, 4)
    truth = ft.random.normal(a, (TASKS, DIMS, 1))
    x = ft.random.normal(b, (TASKS, 2 * POINTS, DIMS))
    y = (x @ truth)[..., 0]
    wrong = ft.random.bernoulli(c, 1 / 3, (TASKS, POINTS))
    noise = 3.0 + 6.0 * ft.random.normal(d, (TASKS, POINTS))  # wrong targets are too high on average
    return (x[:, :POINTS], y[:, :POINTS] + wrong * noise), (x[:, POINTS:], y[:, POINTS:])


def learned(meta, errors):
    """A function of one error, as a small network has it."""
    h = torch.tanh(ft.nn.linear(torch.stack([errors, errors**2], -1) / 4, **meta["hidden"]))  # (B, 16)
    return ft.nn.linear(h, **meta["out"])[..., 0]


def loss_fn(params, batch, key):
    x, y, meta = batch
    errors = x @ params["w"] - y
    if "rate" in meta:
        return meta["rate"] * torch.mean(errors**2)
    return torch.mean(learned(meta, errors))


inner = ft.optim.sgd(0.1)
inner_step = ft.train_step(loss_fn, inner)


def tested_loss(meta, task):
    """Train on the task with a loss, and return the squared error on right targets."""
    (x, y), (x_test, y_test) = task
    state = ft.init_state({"w": torch.zeros(DIMS)}, inner, key=ft.random.key(0))
    state, _ = ft.unroll(inner_step, state, [(x, y, meta)] * INNER)
    return torch.mean((x_test @ state.params["w"] - y_test) ** 2)


def meta_loss(meta, tasks, key):
    return torch.mean(ft.vmap(lambda task: tested_loss(meta, task))(tasks))


def train(meta):
    optimizer = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adam(1e-2))
    # in eager: a run of 20 steps takes minutes to compile, and a tenth of a second to do
    step = ft.train_step(meta_loss, optimizer)
    state = ft.init_state(meta, optimizer, key=key)
    for t in range(options.steps):
        state, _ = step(state, draw_tasks(ft.random.fold_in(key, t)))
    return state.params


key = ft.random.key(0)
unseen = draw_tasks(ft.random.fold_in(key, 10**6))
k1, k2 = ft.random.split(key)
network = {
    "hidden": {"weight": ft.random.normal(k1, (2, 16)), "bias": torch.zeros(16)},
    "out": {"weight": ft.random.normal(k2, (16, 1)) / 4, "bias": torch.zeros(1)},
}
for name, meta in (("squared errors, at the best rate", {"rate": torch.ones(())}), ("learned loss", network)):
    print(f"trained with {name}: squared error on right targets {meta_loss(train(meta), unseen, None).item():.3f}")
