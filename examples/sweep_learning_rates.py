"""Sixteen runs as one: a sweep over learning rates and seeds of a small network, and the best of them.

python examples/sweep_learning_rates.py [--steps 300]
"""

import argparse
import math

import torch

import functrain as ft

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=300)
options = parser.parse_args()


def init(key):
    first, second, data = ft.random.split(key, 3)
    params = {
        "hidden": {"weight": ft.random.normal(first, (1, 64)), "bias": torch.zeros(64)},
        "out": {"weight": ft.random.normal(second, (64, 1)) / 8, "bias": torch.zeros(1)},
    }
    return ft.init_state(params, optimizer, key=data)


def loss_fn(params, x, key):
    hidden = torch.tanh(ft.nn.linear(x, **params["hidden"]))  # (B, 64)
    return torch.mean((ft.nn.linear(hidden, **params["out"]) - torch.sin(3 * x)) ** 2)


optimizer = ft.optim.inject_hyperparams(ft.optim.adam)(learning_rate=1e-3)
over = ft.train.grid({"learning_rate": [1e-4, 1e-3, 1e-2, 1e-1], "seed": range(4)})
sweep = ft.sweep(ft.train_step(loss_fn, optimizer), over)
states = sweep.init(init)
x = torch.linspace(-math.pi, math.pi, 64)[:, None]  # (B, 1)
step = ft.compile(sweep, donate=True)
for _ in range(options.steps):
    states, metrics = step(states, x)
for i, loss in enumerate(metrics["loss"].tolist()):
    print(f"learning rate {over['learning_rate'][i]:<7g} seed {over['seed'][i]}  loss {loss:.5f}")
best = sweep.best(metrics["loss"])
print(f"the best lane is {best}: {sweep.values(best)}")
state = sweep.lane(states, best)  # a state as any other, to go on with or to save
