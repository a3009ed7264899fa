"""MAML: parameters from which one step of gradient descent, on ten points, fits a sine of any amplitude and phase.

python examples/maml_sinusoids.py [--steps 1000]

Source: Finn et al. 2017 (arXiv:1703.03400), section 5.1.
"""

import argparse
import math

import torch

import functrain as ft

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=1000)
options = parser.parse_args()
TASKS, POINTS = 16, 10


def init(key):
    sizes = [1, 40, 40, 1]
    keys = ft.random.split(key, 3)
    return [
        {"weight": ft.random.normal(k, (m, n)) / math.sqrt(m), "bias": torch.zeros(n)}
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def loss_fn(params, batch, key=None):
    h, y = batch
    for layer in params[:-1]:
        h = torch.tanh(ft.nn.linear(h, **layer))  # (B, 40)
    return torch.mean((ft.nn.linear(h, **params[-1]) - y) ** 2)


def draw_tasks(key):
    """Return points to learn from and points to be tested on, two pairs of (TASKS, POINTS, 1)."""
    a, b, c = ft.random.split(key, 3)
    amplitude = ft.random.uniform(a, (TASKS, 1, 1), minval=0.1, maxval=5.0)
    phase = ft.random.uniform(b, (TASKS, 1, 1), minval=0.0, maxval=math.pi)
    x = ft.random.uniform(c, (TASKS, 2 * POINTS, 1), minval=-5.0, maxval=5.0)
    y = amplitude * torch.sin(x + phase)
    return (x[:, :POINTS], y[:, :POINTS]), (x[:, POINTS:], y[:, POINTS:])


inner = ft.optim.sgd(0.05)
inner_step = ft.train_step(loss_fn, inner)


def adapted_loss(params, task):
    learned, tested = task
    state, _ = ft.unroll(inner_step, ft.init_state(params, inner, key=ft.random.key(0)), [learned])
    return loss_fn(state.params, tested)


def meta_loss(params, tasks, key):
    return torch.mean(ft.vmap(lambda task: adapted_loss(params, task))(tasks))


optimizer = ft.optim.adam(3e-3)
step = ft.compile(ft.train_step(meta_loss, optimizer), donate=True)
key = ft.random.key(0)
state = ft.init_state(init(key), optimizer, key=key)
unseen = draw_tasks(ft.random.fold_in(key, 10**6))
print(f"one step from fresh parameters: loss {meta_loss(state.params, unseen, None).item():.3f}")
for t in range(options.steps):
    state, _ = step(state, draw_tasks(ft.random.fold_in(key, t)))
before = torch.mean(ft.vmap(lambda task: loss_fn(state.params, task[1]))(unseen))
print(f"trained parameters, before a step: loss {before.item():.3f}")
print(f"one step from trained parameters: loss {meta_loss(state.params, unseen, None).item():.3f}")
