"""A convolutional network of torch, with batch norm, trained on handwritten digits as it is.

python examples/digits_cnn.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import functrain as ft

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype("float32").reshape(-1, 1, 8, 8)
train, held_out = ft.data.split({"x": images, "y": labels}, validation=0.2, seed=2)
validation = ft.data.batches(held_out, batch=360, shuffle=False)
torch.manual_seed(0)  # torch's own initial weights
conv = [nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1)]
head = [nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.4), nn.Linear(1024, 10)]
net = ft.from_module(nn.Sequential(*conv, *head))


def loss_fn(params, buffers, batch, key):  # key is None in evaluation
    apply = net.evaluate if key is None else net.apply
    logits, buffers = apply(params, buffers, key, batch["x"])  # (B, 10)
    return ft.losses.classification(logits, batch["y"]), buffers


optimizer = ft.optim.adamw(ft.schedules.cosine_decay_schedule(3e-3, 400))
state = ft.init_state(net.params, optimizer, key=ft.random.key(0), buffers=net.buffers)
step = ft.train_step(loss_fn, optimizer, buffers=True)
validate = ft.train.every(100, ft.train.validate(loss_fn, validation, buffers=True, compile=False))
hooks = [validate, ft.train.progress(every=50)]
state = ft.fit(step, state, ft.data.batches(train, batch=64, seed=0), steps=400, every=hooks)
print(ft.evaluate(loss_fn, state.params, validation, buffers=state.buffers, compile=False))
