"""A whole run, watched, stopped early and taken back to its best, beside the loop that one writes in torch."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import functrain as ft

EVERY, PATIENCE, STEPS, RATE = 10, 3, 2000, 0.01


def layer(key: Tensor, inputs: int, outputs: int) -> dict[str, Tensor]:
    return {"weight": ft.nn.init.he_normal()(key, (inputs, outputs)), "bias": torch.zeros(outputs)}


def logits_of(params: Any, x: Tensor) -> Tensor:
    return ft.nn.linear(torch.relu(ft.nn.linear(x, **params["hidden"])), **params["out"])


def in_torch(params: Any, batches: Any, x: Tensor, y: Tensor) -> tuple[int, int, float]:
    """Return the step that ended the run, the best one, and its accuracy."""
    first, second = torch.nn.Linear(64, 32), torch.nn.Linear(32, 10)
    for module, tree in ((first, params["hidden"]), (second, params["out"])):
        with torch.no_grad():
            module.weight.copy_(tree["weight"].T)
            module.bias.copy_(tree["bias"])
    model = torch.nn.Sequential(first, torch.nn.ReLU(), second)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / STEPS)))
    best, at, weights, waited = math.inf, 0, model.state_dict(), 0
    for t in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(batches[t]["x"]), batches[t]["y"]).backward()
        optimizer.step()
        schedule.step()
        if (t + 1) % EVERY == 0:
            with torch.no_grad():
                loss = F.cross_entropy(model(x), y).item()
            waited = 0 if loss < best else waited + 1
            if loss < best:
                best, at, weights = loss, t + 1, copy.deepcopy(model.state_dict())
            if waited >= PATIENCE:
                break
    model.load_state_dict(weights)
    return t + 1, at, float((model(x).argmax(-1) == y).float().mean())


def test_a_run_decides_as_a_plain_torch_loop_on_the_same_batches(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    train, held_out = ft.data.split({"x": (images / 16).astype("float32"), "y": labels}, validation=0.2, seed=2)
    batches = ft.data.batches(train, batch=64, seed=0)
    validation = ft.data.batches(held_out, batch=100, shuffle=False)  # the last batch is short
    key, first, second = ft.random.split(ft.random.key(0), 3)
    params = {"hidden": layer(first, 64, 32), "out": layer(second, 32, 10)}

    def loss_fn(params: Any, batch: Any, key: Tensor | None) -> ft.Loss:
        return ft.losses.classification(logits_of(params, batch["x"]), batch["y"])

    optimizer = ft.optim.adamw(ft.schedules.cosine_decay_schedule(RATE, STEPS), weight_decay=0.01)
    hooks = [
        ft.train.early_stopping("validation_loss", patience=PATIENCE),
        ft.checkpoint.every(1000, tmp_path, keep_best=ft.checkpoint.Best("validation_loss")),
        ft.train.every(EVERY, ft.train.validate(loss_fn, validation, compile=False)),
    ]
    state = ft.init_state(params, optimizer, key=key)
    state = ft.fit(ft.train_step(loss_fn, optimizer), state, batches, steps=STEPS, every=hooks)
    best = ft.checkpoint.load(ft.checkpoint.best(tmp_path), like=state)
    found = ft.evaluate(loss_fn, best.params, validation, compile=False)

    (whole,) = ft.data.batches(held_out, batch=len(held_out["y"]), shuffle=False)
    stopped, at, accuracy = in_torch(params, batches, whole["x"], whole["y"])
    assert (int(state.step), int(best.step)) == (stopped, at) and stopped < STEPS
    assert abs(found["accuracy"] - accuracy) < 1e-6
