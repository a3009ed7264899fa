"""The whole of pre-training a BERT on a page: masked tokens and next sentences, of the text that every Python carries.

python examples/pretrain_bert.py [--steps 4000] [--corpus FOLDER] [--run runs/bert]     the same again goes on
"""

import argparse
import dataclasses
from pathlib import Path

import functrain as ft
from functrain.models import bert

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=4000)
parser.add_argument("--width", type=int, default=128)
parser.add_argument("--vocabulary", type=int, default=1024)
parser.add_argument("--corpus", default="python", help="a folder of texts, in place of the built-in one")
parser.add_argument("--no-compile", action="store_true")
parser.add_argument("--run", type=Path, default=Path("runs/bert"))
options = parser.parse_args()

train, held_out = (ft.data.corpus(options.corpus, split=side) for side in ("train", "validation"))
words = options.run / "tokenizer.json"
known = ft.data.load_tokenizer(words) if words.exists() else None
tokenizer = known or ft.data.train_wordpiece(train, vocab_size=options.vocabulary)
tokenizer.save(words)
config = bert.Config(
    vocab=tokenizer.vocab_size, context=64, layers=2, heads=2, width=options.width, inner=4 * options.width,
    attention="math",
)  # fmt: skip


def batches(corpus, epochs=None):
    shape = {"batch": 32, "context": config.context, "seed": 0, "epochs": epochs}
    pairs = ft.data.sentence_pairs(corpus, tokenizer, folder=options.run / "tokens", **shape)
    return ft.data.masked(pairs, tokenizer, seed=1, max_predictions=16)  # logits are computed of 16 places a row


def loss_fn(params, batch, key):  # key is None in evaluation
    rows = {"types": batch["token_types"], "mask": batch["attention_mask"], "places": batch["places"]}
    predictions = bert.apply(params, batch["tokens"], config, **rows, key=key)  # (B, 16, V) and (B, 2)
    weights = bert.token_weights(batch["mask"])
    return bert.pretraining_loss(predictions, batch["targets"], weights, batch["next_sentence"])


rates = ft.schedules.warmup_cosine_decay_schedule(0.0, 3e-3, options.steps // 10, options.steps, 1e-5)
matrices = bert.labels(config).matrices  # of the blocks, by Muon at the size of AdamW's updates; AdamW for the rest
muon = ft.optim.muon(rates, weight_decay=0.01, muon_weight_dimension_numbers=matrices, consistent_rms=0.2)
optimizer = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), muon)
step = ft.train_step(loss_fn, optimizer)
if not options.no_compile:
    step = ft.compile(step, donate=True, cache=options.run / "programs")

key, rows, validation = ft.random.key(0), batches(train), batches(held_out, epochs=1)
state = ft.init_state(bert.init(config, key), optimizer, key=key)
about = {"data": rows.description, "model": dataclasses.asdict(config), "steps": options.steps}
state = ft.checkpoint.resume(options.run, like=state, metadata=about)
counted = {"learning_rate": rates, "samples": "weight", "tokens": 32 * config.context}
bar = ft.train.progress(every=50, **counted)
hooks = [
    ft.train.every(options.steps // 5, ft.train.validate(loss_fn, validation, progress=bar.evaluating, compile=False)),
    ft.train.record(options.run, hyperparameters=about, **counted),
    ft.checkpoint.every(500, options.run, metadata=about),
    bar,
]
state = ft.fit(step, state, rows, steps=options.steps, every=hooks)
print(ft.evaluate(loss_fn, state.params, validation, compile=False))
