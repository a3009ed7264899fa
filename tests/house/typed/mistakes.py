"""What mypy and pyright must find: a mistake on each line that ends with `# wrong`, and on no other one."""

# what --strict has beside the flags in pyproject.toml
# mypy: disallow-untyped-calls, warn-return-any, disallow-subclassing-any

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import functrain as ft

Batch = dict[str, Tensor]
Params = dict[str, Tensor]


def loss_fn(params: Params, batch: Batch, key: Tensor) -> ft.Loss:
    errors = (batch["x"] @ params["w"] - batch["y"]) ** 2
    return ft.Loss(errors.sum(), errors.new_tensor(len(errors)), {})


def with_metrics(params: Params, batch: Batch, key: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.ones(()), {}


params = {"w": torch.zeros(3)}
batch = {"x": torch.ones(4, 3), "y": torch.zeros(4)}
key = ft.random.key(0)
optimizer = ft.optim.adamw(1e-3)
step = ft.train_step(loss_fn, optimizer)
compiled = ft.compile(step, donate=True)
state = ft.init_state(params, optimizer, key=key)


# a batch of another type than the loss says
ft.grad(loss_fn)(params, [torch.ones(4, 3)], key)  # wrong
ft.compile(ft.value_and_grad(loss_fn))(params, batch["x"], key)  # wrong
ft.mixed_precision(loss_fn, "bf16")(params, batch["x"], key)  # wrong
ft.hvp(loss_fn, params, batch["x"], params, key=key)  # wrong
ft.hvp(loss_fn, params, batch, torch.ones(3), key=key)  # wrong


# the step
step(state, batch["x"])  # wrong
compiled(state, [torch.ones(4, 3)])  # wrong
step(batch, state)  # wrong
compiled(batch, state)  # wrong
compiled(state)  # wrong
compiled(state, batch, key)  # wrong
new, metrics = step(state, batch)
metrics.mean()  # wrong
new.parameters()  # wrong
new, loss, metrics = compiled(state, batch)  # wrong


# the optimizer
ft.optim.adamw("1e-3")  # wrong
ft.train_step(loss_fn, ft.optim.adamw)  # wrong
ft.train_step(lambda params, batch: params, optimizer)  # wrong
ft.train_step(loss_fn, optimizer, buffers=True)  # wrong
ft.train_step(loss_fn, torch.optim.AdamW([batch["x"]]))  # wrong
ft.optim.adamw(1e-3, weight_decy=0.1)  # wrong
ft.init_state(params, optimizer)  # wrong


# gradients
value, aux, grads = ft.value_and_grad(with_metrics, has_aux=True)(params, batch, key)  # wrong
print(ft.value_and_grad(loss_fn)(params, batch, key)[1]["w"].grads)  # wrong
ft.value_and_grad(with_metrics)  # wrong
ft.grad(loss_fn, has_aux=True)  # wrong
ft.accumulate(ft.grad(loss_fn), 4)  # wrong
ft.recompute(loss_fn, policy=None)  # wrong


# the loop
def after(state: ft.TrainState, metrics: dict[str, Any]) -> None: ...


hook: ft.train.Hook = after  # wrong
ft.fit(step, state, [batch], steps=10, every=[after])  # wrong
ft.fit(step, state, [batch], steps="10")  # wrong
ft.fit(loss_fn, state, [batch], steps=10)  # wrong
ft.fit(step, state, [batch["x"]], steps=10)  # wrong
ft.fit(compiled, state, iter([(batch["x"], batch["y"])]), steps=10)  # wrong
ft.fit(step, state, 10, steps=10)  # wrong
loss_of_batch: ft.train.LossFn[Tensor] = loss_fn  # wrong
numbers: ft.train.Batches[Batch] = 3  # wrong
