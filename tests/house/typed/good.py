"""What users write, checked by mypy --strict and pyright: each `assert_type` is the type that they see."""

# what --strict has beside the flags in pyproject.toml
# mypy: disallow-untyped-calls, warn-return-any, disallow-subclassing-any

from __future__ import annotations

from typing import Any, assert_type

import torch
from torch import Tensor, nn

import functrain as ft

Batch = dict[str, Tensor]
Params = dict[str, Tensor]
Metrics = dict[str, Tensor]


def loss_fn(params: Params, batch: Batch, key: Tensor) -> ft.Loss:
    errors = (batch["x"] @ params["w"] - batch["y"]) ** 2
    return ft.Loss(errors.sum(), errors.new_tensor(len(errors)), {})


def with_metrics(params: Params, batch: Batch, key: Tensor) -> tuple[Tensor, Metrics]:
    loss = torch.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)
    return loss, {"loss": loss}


params = {"w": torch.zeros(3)}
batch = {"x": torch.ones(4, 3), "y": torch.zeros(4)}
key = ft.random.key(0)


# a step, alone and compiled
optimizer = ft.optim.chain(
    ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(ft.schedules.cosine_decay_schedule(1e-3, 10))
)
step = ft.train_step(loss_fn, optimizer, accumulate=2)
state = ft.init_state(params, optimizer, key=key)
assert_type(state, ft.TrainState)
new, metrics = step(state, batch)
assert_type(new, ft.TrainState)
assert_type(metrics, dict[str, Tensor])
compiled = ft.compile(step, donate=True)
new, metrics = compiled(state, batch)
assert_type(new, ft.TrainState)
assert_type(metrics, dict[str, Tensor])
assert_type(compiled.fn.optimizer, ft.optim.GradientTransformation)


# the loop, its hooks, and many runs as one
def show(t: int, state: ft.TrainState, metrics: dict[str, Any]) -> None:
    print(t, metrics["loss"])


hook: ft.train.Hook = show
batches: ft.train.Batches[Batch] = [batch]
end = ft.fit(compiled, new, batches, steps=10, every=[hook, ft.train.every(5, show), ft.train.stop_after(3)])
assert_type(end, ft.TrainState)
ft.fit(step, state, batches, steps=10)
ft.fit(step, state, iter([batch] * 10), steps=10)
ft.fit(step, state, ft.data.batches(batch, batch=2, seed=0), steps=10)
ft.fit(step, state, ft.data.prefetch([batch] * 10, 0, 10), steps=10)
ft.fit(step, state, ft.data.windows(torch.arange(100), batch=2, context=8, seed=0), steps=10)
ft.fit(lambda state, batch: step(state, batch), state, [batch] * 10, steps=10)


def trained(loader: torch.utils.data.DataLoader[Batch]) -> ft.TrainState:
    return ft.fit(step, state, loader, steps=10)


swept = ft.sweep(step, {"seed": [0, 1]})
states, metrics = ft.compile(swept)(swept.init(state), batch)
assert_type(states, ft.TrainState)
last, history = ft.unroll(step, state, [batch] * 3)
assert_type(last, ft.TrainState)
ft.fit(ft.compile(swept), states, [batch] * 10, steps=10)


# gradients: the parameters of the function, and a tree like its first argument
assert_type(ft.grad(loss_fn)(params, batch, key), Params)
loss, grads = ft.value_and_grad(loss_fn)(params, batch, key=key)
assert_type(loss, ft.Loss)
assert_type(grads, Params)
(value, aux), grads = ft.value_and_grad(with_metrics, has_aux=True)(params, batch, key)
assert_type(value, Tensor)
assert_type(aux, Metrics)
grads, aux = ft.grad(with_metrics, has_aux=True)(params, batch, key)
assert_type(grads, Params)
loss, of_batch = ft.value_and_grad(loss_fn, argnums=1)(params, batch, key)
(loss, grads) = ft.accumulate(ft.value_and_grad(loss_fn), 2)(params, batch, key)
assert_type(grads, Params)
compiled_grads = ft.compile(ft.grad(loss_fn))(params, batch, key=key)
assert_type(compiled_grads, Params)


# gradients of single examples, and second derivatives
assert_type(ft.per_example_grad(loss_fn)(params, batch, key), Params)
losses, rows = ft.transforms.per_example_value_and_grad(loss_fn)(params, batch, key)
assert_type(losses, ft.Loss)
assert_type(ft.hvp(loss_fn, params, batch, grads, key=key), Params)
private = ft.train.private_step(loss_fn, ft.optim.dpsgd(0.1, 1.0, 1.0, 0))
new, metrics = private(state, batch)


# transforms that keep the function's type
half = ft.mixed_precision(loss_fn, ft.Policy(compute=torch.bfloat16))
assert_type(half(params, batch, key), ft.Loss)
assert_type(ft.autocast(loss_fn, "bf16")(params, batch, key=key), ft.Loss)
assert_type(ft.recompute(loss_fn, "dots")(params, batch, key), ft.Loss)
assert_type(ft.recompute_layers(loss_fn, budget=0.5)(params, batch, key), ft.Loss)


def double(x: Tensor, scale: float = 2.0) -> Tensor:
    return scale * x


assert_type(ft.vmap(double)(batch["x"]), Tensor)


# any module of torch
functional = ft.from_module(nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1)))


def module_loss(params: Any, buffers: Any, batch: Batch, key: Tensor) -> tuple[Tensor, Any]:
    y, buffers = functional.apply(params, buffers, key, batch["x"])
    return ft.losses.l2_loss(y.squeeze(-1), batch["y"]).mean(), buffers


wanted: ft.train.LossFnWithBuffers[Batch] = module_loss
module_step = ft.train_step(module_loss, ft.optim.sgd(0.1, momentum=0.9), buffers=True)
begun = ft.init_state(functional.params, ft.optim.sgd(0.1, momentum=0.9), key=key, buffers=functional.buffers)
begun, metrics = module_step(begun, batch)
