"""Differentially private training: what a model learns under a privacy loss of 1 and of 8, and without privacy.

python examples/private_training.py     (needs the extra `privacy`)

Source: Abadi et al. 2016 (arXiv:1607.00133), algorithm 1.
"""

import torch

import functrain as ft

EXAMPLES, DIMS, STEPS, RATE, DELTA = 2000, 20, 200, 0.05, 1e-5
CAPACITY = 160  # rows of a batch: 100 are drawn on average, and 160 is six deviations more
keys = ft.random.split(ft.random.key(0), 4)
truth = ft.random.normal(keys[0], (DIMS,))


def draw(key):
    x = ft.random.normal(key, (EXAMPLES, DIMS))
    return {"x": x, "y": torch.where(x @ truth > 0, 1.0, -1.0)}


train, test = draw(keys[1]), draw(keys[2])


def loss_fn(params, batch, key=None):
    margins = batch["y"] * (batch["x"] @ params["w"] + params["b"])  # (B,)
    weights = batch["mask"].to(margins.dtype)
    return ft.Loss(torch.sum(torch.nn.functional.softplus(-margins) * weights), torch.sum(weights), {})


def accuracy(params):
    return torch.mean((test["y"] * (test["x"] @ params["w"] + params["b"]) > 0).float()).item()


def trained(make_step, optimizer):
    step = ft.compile(make_step(loss_fn, optimizer), donate=True)
    state = ft.init_state({"w": torch.zeros(DIMS), "b": torch.zeros(())}, optimizer, key=keys[3])
    for t in range(STEPS):
        rows, mask = ft.train.privacy.poisson_rows(ft.random.fold_in(keys[3], t), EXAMPLES, RATE, CAPACITY)
        state, _ = step(state, {"x": train["x"][rows], "y": train["y"][rows], "mask": mask})
    return accuracy(state.params)


for epsilon in (1.0, 8.0):
    sigma = ft.train.privacy.noise_multiplier(epsilon=epsilon, delta=DELTA, sampling_rate=RATE, steps=STEPS)
    optimizer = ft.optim.dpsgd(4.0, l2_norm_clip=1.0, noise_multiplier=sigma, seed=1)
    print(f"epsilon {epsilon:g}, noise {sigma:.2f}: accuracy {trained(ft.train.private_step, optimizer):.3f}")
print(f"not private: accuracy {trained(ft.train_step, ft.optim.sgd(4.0)):.3f}")
