"""The whole of pre-training a Llama on a page: packed documents of the text that every Python carries.

python examples/pretrain_llama.py [--steps 1200] [--corpus FOLDER] [--run runs/llama]     the same again goes on
"""

import argparse
import dataclasses
from pathlib import Path

import torch

import functrain as ft
from functrain.models import llama

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=1200)
parser.add_argument("--width", type=int, default=128)
parser.add_argument("--vocabulary", type=int, default=1024)
parser.add_argument("--corpus", default="python", help="a file or folder of texts, in place of the built-in one")
parser.add_argument("--no-compile", action="store_true")
parser.add_argument("--run", type=Path, default=Path("runs/llama"))
options = parser.parse_args()

train, held_out = (ft.data.corpus(options.corpus, split=side) for side in ("train", "validation"))
words = options.run / "tokenizer.json"
known = ft.data.load_tokenizer(words) if words.exists() else None
tokenizer = known or ft.data.train_bpe(train, vocab_size=options.vocabulary)
tokenizer.save(words)
config = llama.Config(
    vocab=tokenizer.vocab_size, context=128, layers=4, heads=4, key_heads=2, width=options.width,
    inner=3 * options.width, tied=True, attention="math",
)  # fmt: skip


def batches(corpus, epochs=None):
    tokens = ft.data.tokenize(corpus, tokenizer, folder=options.run / "tokens")
    return ft.data.packed(tokens, batch=16, context=config.context, seed=0, end=tokenizer.end, epochs=epochs)


def loss_fn(params, batch, key):  # key is None in evaluation
    places = {"documents": batch["documents"], "positions": batch["positions"], "mask": batch["mask"]}
    x = llama.hidden(params, batch["tokens"], config, **places, key=key)  # (B, T, D)
    return ft.losses.next_token_from_hidden(x, llama.head(params), batch["targets"], batch["mask"])


rates = ft.schedules.warmup_cosine_decay_schedule(0.0, 3e-3, options.steps // 20, options.steps, 1e-4)
decayed = llama.labels(config).decayed  # weights of two dimensions, but no embeddings
optimizer = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(rates, weight_decay=0.1, mask=decayed))
step = ft.train_step(loss_fn, optimizer, accumulate=2)
if not options.no_compile:
    step = ft.compile(step, donate=True, cache=options.run / "programs")

key, rows, validation = ft.random.key(0), batches(train), batches(held_out, epochs=1)
state = ft.init_state(llama.init(config, key), optimizer, key=key)
about = {"data": rows.description, "model": dataclasses.asdict(config), "steps": options.steps}
state = ft.checkpoint.resume(options.run, like=state, metadata=about)
counted = {"learning_rate": rates, "tokens": "weight"}
bar = ft.train.progress(every=20, **counted)
hooks = [
    ft.train.every(options.steps // 4, ft.train.validate(loss_fn, validation, progress=bar.evaluating, compile=False)),
    ft.train.record(options.run, hyperparameters=about, **counted),
    ft.checkpoint.every(200, options.run, metadata=about),
    bar,
]
state = ft.fit(step, state, rows, steps=options.steps, every=hooks)
start = torch.tensor([[tokenizer.end]])  # of a new document
text = ft.generate(llama, state.params, start, config, ft.random.key(1), steps=100, temperature=0.8)
print(tokenizer.decode(text[0].tolist()))
print(ft.evaluate(loss_fn, state.params, validation, compile=False))
