"""A vision transformer trained on handwritten digits: over 97 of 100 that it has not seen are right.

python examples/vit_digits.py
"""

import torch
from sklearn.datasets import load_digits

import functrain as ft
from functrain.models import vit

images, labels = load_digits(return_X_y=True)
data = {"x": torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), "y": torch.tensor(labels)}
held = torch.arange(len(labels)) % 5 == 4  # every fifth is held out
train, held_out = ({name: column[rows] for name, column in data.items()} for rows in (~held, held))
validation = ft.data.batches(held_out, batch=359, shuffle=False)
config = vit.Config(  # a patch is a row of pixels
    image=8, patch=(1, 8), channels=1, layers=2, heads=4, width=96, inner=192, num_labels=10, dropout=0.2
)


def loss_fn(params, batch, key):  # key is None in evaluation
    return ft.losses.classification(vit.apply(params, batch["x"], config, key=key), batch["y"])


params = vit.init(config, ft.random.key(0))
rates = ft.schedules.warmup_cosine_decay_schedule(0.0, 2e-3, 50, 800)
optimizer = ft.optim.adamw(rates, weight_decay=0.1, mask=vit.labels(config).decayed)
state = ft.init_state(params, optimizer, key=ft.random.key(1))
step = ft.compile(ft.train_step(loss_fn, optimizer), donate=True)
validate = ft.train.every(200, ft.train.validate(loss_fn, validation, compile=False))
hooks = [validate, ft.train.progress(every=50)]
state = ft.fit(step, state, ft.data.batches(train, batch=64, seed=0), steps=800, every=hooks)
print(ft.evaluate(loss_fn, state.params, validation, compile=False))
