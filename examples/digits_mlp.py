"""A classifier of handwritten digits: dropout, validation, early stopping, the best checkpoint, a schedule, progress.

python examples/digits_mlp.py
"""

import torch
from sklearn.datasets import load_digits

import functrain as ft

images, labels = load_digits(return_X_y=True)
train, held_out = ft.data.split({"x": (images / 16).astype("float32"), "y": labels}, validation=0.2, seed=2)
validation = ft.data.batches(held_out, batch=360, shuffle=False)
key, first, second = ft.random.split(ft.random.key(0), 3)
hidden = {"weight": ft.nn.init.he_normal()(first, (64, 256)), "bias": torch.zeros(256)}
out = {"weight": ft.nn.init.he_normal()(second, (256, 10)), "bias": torch.zeros(10)}


def loss_fn(params, batch, key):  # key is None in evaluation
    h = torch.relu(ft.nn.linear(batch["x"], **params["hidden"]))  # (B, 256)
    logits = ft.nn.linear(ft.nn.dropout(h, 0.3, key), **params["out"])  # (B, 10)
    return ft.losses.classification(logits, batch["y"])


optimizer = ft.optim.adamw(ft.schedules.cosine_decay_schedule(3e-3, 2000), weight_decay=1e-2)
state = ft.init_state({"hidden": hidden, "out": out}, optimizer, key=key)
validate = ft.train.every(25, ft.train.validate(loss_fn, validation))
stop = ft.train.early_stopping("validation_loss", patience=8)
saves = ft.checkpoint.every(500, "runs/digits", keep_best=ft.checkpoint.Best("validation_loss"))
step = ft.compile(ft.train_step(loss_fn, optimizer), donate=True)
hooks = [validate, stop, saves, ft.train.progress(every=25)]
state = ft.fit(step, state, ft.data.batches(train, batch=64, seed=0), steps=2000, every=hooks)
best = ft.checkpoint.load(ft.checkpoint.best("runs/digits"), like=state)
print(f"step {int(best.step)}: {ft.evaluate(loss_fn, best.params, validation)}")
