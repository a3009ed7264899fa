"""What an installed functrain does with its own dependencies alone: `make wheel` runs it."""

import tempfile
from pathlib import Path

import torch

import functrain as ft

assert "site-packages" in ft.__file__, ft.__file__
x = ft.random.normal(ft.random.key(0), (300, 2))
data = {"x": x, "y": (x[:, 0] > x[:, 1]).long()}
train, held_out = ft.data.split(data, validation=0.2, seed=0)
validation = ft.data.batches(held_out, batch=32, shuffle=False)


def loss_fn(params, batch, key):
    return ft.losses.classification(ft.nn.linear(batch["x"], **params), batch["y"])


optimizer = ft.optim.adamw(0.1)
params = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}
with tempfile.TemporaryDirectory() as run:
    state = ft.init_state(params, optimizer, key=ft.random.key(1))
    saves = ft.checkpoint.every(50, run, keep_best=ft.checkpoint.Best("validation_loss"))
    hooks = [ft.train.every(10, ft.train.validate(loss_fn, validation, compile=False)), saves, ft.train.record(run)]
    step = ft.compile(ft.train_step(loss_fn, optimizer), donate=True)
    state = ft.fit(step, state, ft.data.batches(train, batch=32, seed=0), steps=100, every=hooks)
    assert len(Path(run, "metrics.jsonl").read_text().splitlines()) == 100
    best = ft.checkpoint.load(ft.checkpoint.best(run), like=state)
found = ft.evaluate(loss_fn, best.params, validation, compile=False)
assert found["accuracy"] > 0.9, found
print(f"functrain {ft.__version__} from {Path(ft.__file__).parent.name}: {found}")
