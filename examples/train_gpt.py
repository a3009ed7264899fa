"""The whole of training on a page: a GPT on the text that every Python carries.

python examples/train_gpt.py [--steps 2000] [--run runs/example]
"""

import argparse
import dataclasses

import torch

import functrain as ft
from functrain.models import gpt2

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=2000)
parser.add_argument("--run", default="runs/example")
options = parser.parse_args()

config = gpt2.Config(vocab=256, context=128, layers=4, heads=4, width=128)


def loss_fn(params, batch, key):
    logits = gpt2.apply(params, batch["tokens"], config, key=key)  # (B, T, V)
    return ft.losses.next_token(logits, batch["targets"], batch["mask"])  # a Loss: sum, weight, metrics


def show(t, state, metrics):
    print(f"step {t}  loss {metrics['loss']:.3f}  gradient norm {metrics['grad_norm']:.2f}", flush=True)


loss_fn = ft.mixed_precision(loss_fn, ft.Policy(compute=torch.bfloat16))
schedule = ft.schedules.warmup_cosine_decay_schedule(0.0, 1e-3, 100, 2000)
optimizer = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(schedule, weight_decay=0.1))
step = ft.compile(ft.train_step(loss_fn, optimizer, accumulate=4), donate=True)

key = ft.random.key(0)
state = ft.init_state(gpt2.init(config, key), optimizer, key=key)
batches = ft.data.windows(ft.data.corpus("python"), batch=16, context=config.context, seed=0)
about = {"data": batches.description, "model": dataclasses.asdict(config)}
# with another text or model this is an error that lists what differs
state = ft.checkpoint.resume(options.run, like=state, metadata=about)
hooks = [ft.train.every(20, show), ft.checkpoint.every(500, options.run, metadata=about)]
state = ft.fit(step, state, batches, steps=options.steps, every=hooks)
