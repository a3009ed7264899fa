"""Influence functions find wrong labels: which examples of a trained classifier harm its loss on clean data?

python examples/influence_of_labels.py

Source: Koh and Liang 2017 (arXiv:1703.04730), section 5.4.
"""

import torch

import functrain as ft

EXAMPLES, DIMS, WRONG = 400, 10, 40
keys = ft.random.split(ft.random.key(0), 4)
truth = ft.random.normal(keys[0], (DIMS,))


def draw(key):
    x = ft.random.normal(key, (EXAMPLES, DIMS))
    return {"x": x, "y": torch.where(x @ truth > 0, 1.0, -1.0)}


train, clean = draw(keys[1]), draw(keys[2])
wrong = ft.random.permutation(keys[3], EXAMPLES)[:WRONG]
train["y"][wrong] *= -1


def loss_fn(params, batch, key=None):
    margins = batch["y"] * (batch["x"] @ params["w"] + params["b"])  # (B,)
    return torch.mean(torch.nn.functional.softplus(-margins)) + 0.005 * ft.tree.vdot(params, params)


optimizer = ft.optim.adam(0.1)
step = ft.compile(ft.train_step(loss_fn, optimizer), donate=True)
state = ft.init_state({"w": torch.zeros(DIMS), "b": torch.zeros(())}, optimizer, key=keys[0])
for _ in range(300):
    state, metrics = step(state, train)
params = state.params
print(f"loss on the train side {metrics['loss'].item():.3f}, on clean data {loss_fn(params, clean).item():.3f}")

harm = ft.curvature.influence(loss_fn, params, train, ft.grad(loss_fn)(params, clean), steps=20)  # (EXAMPLES,)
worst = torch.topk(harm, WRONG).indices
found = len(set(worst.tolist()) & set(wrong.tolist()))
print(f"of the {WRONG} examples that harm most, {found} have a wrong label; by chance: {WRONG**2 / EXAMPLES:g}")
