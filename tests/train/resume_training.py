"""Train a tiny GPT that goes on from its newest checkpoint: `python resume_training.py RUN`.

Forty steps with dropout, a schedule, clipping, two micro-batches and a reading thread. `RUN/batches` gets a line for
every batch that was trained on, and `RUN/final` the last state. The import of this module computes nothing, so that a
test can fork processes that start where `python` would.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import torch

import functrain as ft
from functrain import checkpoint, data, optim, random, schedules
from functrain.models import gpt2
from functrain.train import TrainState, fit, init_state, train_step

STEPS = 40
SAVED_EVERY = 3


def train(run: Path, steps: int = STEPS, *, asynchronous: bool = False) -> TrainState:
    """Train, or go on training, to the last step, and save the state as RUN/final."""
    torch.set_num_threads(1)
    config = gpt2.Config(vocab=64, context=8, layers=1, heads=2, width=16, dropout=0.2)
    schedule = schedules.warmup_cosine_decay_schedule(0.0, 1e-2, 5, STEPS)
    optimizer = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(schedule, weight_decay=0.1))

    def loss_fn(params: Any, batch: Any, key: torch.Tensor) -> ft.Loss:
        logits = gpt2.apply(params, batch["tokens"], config, key=key)  # (B, T, V)
        return ft.losses.next_token(logits, batch["targets"], batch["mask"])

    key = random.key(0)
    state = init_state(gpt2.init(config, key), optimizer, key=key)
    newest = checkpoint.latest(run)
    if newest is not None:
        state = checkpoint.load(newest, like=state)
    hook = checkpoint.every(SAVED_EVERY, run, asynchronous=asynchronous)
    step = train_step(loss_fn, optimizer, accumulate=2)
    state = fit(step, state, Noted(run / "batches"), steps=steps, every=[hook])
    checkpoint.save(run / "final", state)
    return state


class Noted:
    """Batches that write down what they are when they are read."""

    def __init__(self, path: Path) -> None:
        ids = random.randint(random.key(1), (1000,), 0, 64)
        self.windows = data.windows(ids, batch=4, context=8, seed=0)
        self.out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def __getitem__(self, t: int) -> Any:
        batch = self.windows[t]
        digest = hashlib.sha256(b"".join(batch[name].numpy().tobytes() for name in sorted(batch))).hexdigest()
        os.write(self.out, f"{t} {digest}\n".encode())
        return batch


if __name__ == "__main__":
    train(Path(sys.argv[1]))
