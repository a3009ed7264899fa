"""Pre-train a BERT of the shape of `functrain train bert-tiny`, by our step and by a plain loop around transformers'.

    python benchmarks/bert_beside_transformers.py [--steps 1500] [--side ours|theirs|both]

Ours computes logits of the masked places; the module those of all places, as it does for its users.

Both train on the same batches of `ft.data`, from the same first weights, with AdamW of the same numbers, a clip of the
gradient's norm at 1, and the same schedule; no weight is dropped. Ours is `functrain train bert-tiny` with
`--optimizer.name adamw`, as one compiled and donated step; theirs is `torch.compile(BertForPreTraining)`, backward and
fused `torch.optim.AdamW`. Each side is a process of its own with empty compiler caches.

Printed for each: the first step, which compiles; the seconds of the others by the clock and of the process; and on all
pairs of the documents that are held out, the loss and accuracy of masked tokens and of next sentences.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import functrain as ft
from functrain.models import bert

BATCH, CONTEXT = 32, 64
PREDICTIONS = 16  # of a row at most
LEAVES = ("tokens", "token_types", "attention_mask", "targets", "next_sentence")
Step = Callable[[int], float]  # takes step t, and returns its loss
Predict = Callable[[Any], tuple[Tensor, Tensor]]  # logits of each token and of each pair of a batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--side", choices=["ours", "theirs", "both"], default="both")
    parser.add_argument("--text", default="python", help="a folder of texts, in place of the built-in one")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--mask-rate", type=float, default=0.2)
    options = parser.parse_args()
    if options.side == "both":
        for side in ("ours", "theirs"):
            with tempfile.TemporaryDirectory() as cache:
                environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
                # the last option of a name counts
                subprocess.run([sys.executable, __file__, *sys.argv[1:], "--side", side], env=environment, check=True)
        return
    train(options)


def train(options: argparse.Namespace) -> None:
    texts = [ft.data.corpus(options.text, split=side) for side in ("train", "validation")]
    tokenizer = ft.data.train_wordpiece(texts[0], vocab_size=1024)
    batches, held_out = (
        ft.data.masked(
            ft.data.sentence_pairs(text, tokenizer, batch=BATCH, context=CONTEXT, seed=0, epochs=epochs),
            tokenizer, seed=0, rate=options.mask_rate, max_predictions=PREDICTIONS,
        )
        for text, epochs in zip(texts, (None, 1), strict=True)
    )  # fmt: skip
    config = bert.Config(
        vocab=tokenizer.vocab_size, context=CONTEXT, layers=2, heads=2, width=128, inner=512, attention="math"
    )
    # the schedule of the preset: a tenth of the steps up, and down to 1e-5
    rates = ft.schedules.warmup_cosine_decay_schedule(
        0.0, options.learning_rate, options.steps // 10, options.steps, 1e-5
    )
    params = bert.init(config, ft.random.key(0))
    step, predict = {"ours": ours, "theirs": theirs}[options.side](params, config, rates, batches)
    begin = time.perf_counter()
    step(0)
    first = time.perf_counter() - begin
    begin, worked = time.perf_counter(), time.process_time()
    for t in range(1, options.steps):
        loss = step(t)
    seconds, worked = time.perf_counter() - begin, time.process_time() - worked
    found = measured(predict, held_out)
    print(f"{options.side}: {ft.tree.size(params):,} parameters, {options.steps} steps of {BATCH} pairs of {CONTEXT}")
    print(f"  first step      {first:.1f} s")
    each = seconds / max(options.steps - 1, 1)
    print(f"  the others      {seconds:.1f} s, {each * 1e3:.2f} ms each; {worked:.1f} s of the process")
    print(f"  last loss       {loss:.4f}")
    print(f"  masked tokens   {found['tokens_loss']:.4f} nats, {found['tokens_right']:.1%} right")
    print(f"  next sentences  {found['pairs_loss']:.4f} nats, {found['pairs_right']:.1%} right")
    print(f"  torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)


def ours(params: Any, config: bert.Config, rates: Any, batches: Any) -> tuple[Step, Predict]:
    def apply(params: Any, batch: Any, key: Any = None) -> Any:
        rows = {"types": batch["token_types"], "mask": batch["attention_mask"], "places": batch["places"]}
        return bert.apply(params, batch["tokens"], config, **rows, key=key)

    def loss_fn(params: Any, batch: Any, key: Any) -> ft.Loss:
        predictions = apply(params, batch, key)
        weights = bert.token_weights(batch["mask"])
        return bert.pretraining_loss(predictions, batch["targets"], weights, batch["next_sentence"])

    decayed = lambda params: ft.tree.map(lambda leaf: leaf.dim() > 1, params)  # noqa: E731
    adamw = ft.optim.adamw(rates, b2=0.99, weight_decay=0.01, mask=decayed)
    optimizer = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), adamw)
    step = ft.compile(ft.train_step(loss_fn, optimizer), donate=True)
    state = ft.init_state(params, optimizer, key=ft.random.key(1))

    def take(t: int) -> float:
        nonlocal state
        state, metrics = step(state, batches[t])
        return float(metrics["loss"])

    return take, lambda batch: apply(state.params, batch)


class PreTraining(nn.Module):
    """`BertForPreTraining`, called as `modules.stepper` calls a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *leaves: Tensor) -> Tensor:
        tokens, types, mask, labels, next_sentence = leaves
        return self.inner(
            tokens, token_type_ids=types, attention_mask=mask, labels=labels, next_sentence_label=next_sentence
        ).loss


def theirs(params: Any, config: bert.Config, rates: Any, batches: Any) -> tuple[Step, Predict]:
    import transformers
    from modules import stepper

    with tempfile.TemporaryDirectory() as folder:
        bert.to_hf(Path(folder, "model"), params, config)
        module = transformers.BertForPreTraining.from_pretrained(Path(folder, "model")).train()
    compiled = torch.compile(PreTraining(module))
    step = stepper(compiled, bf16=False, weight_decay=0.01, learning_rate=lambda t: float(rates(torch.tensor(t))))

    def take(t: int) -> float:
        return float(step(*_leaves(batches[t])).detach())

    def predict(batch: Any) -> tuple[Tensor, Tensor]:
        tokens, types, mask, _, _ = _leaves(batch)
        found = module.eval()(tokens, token_type_ids=types, attention_mask=mask)
        places = batch["places"][..., None].expand(-1, -1, config.vocab)
        return found.prediction_logits.gather(1, places), found.seq_relationship_logits

    return take, predict


def measured(predict: Predict, held_out: Any) -> dict[str, float]:
    """Return loss and share of right answers, over all masked tokens and over all pairs."""
    sums = dict.fromkeys(("tokens", "tokens_loss", "tokens_right", "pairs", "pairs_loss", "pairs_right"), 0.0)
    for batch in held_out:
        with torch.no_grad():
            of_tokens, of_pairs = predict(batch)
        for name, logits, targets in (
            ("tokens", of_tokens[batch["mask"]], batch["targets"][batch["mask"]]),
            ("pairs", of_pairs, batch["next_sentence"]),
        ):
            sums[name] += len(targets)
            sums[f"{name}_loss"] += float(nn.functional.cross_entropy(logits, targets, reduction="sum"))
            sums[f"{name}_right"] += int((logits.argmax(-1) == targets).sum())
    return {
        f"{name}_{what}": sums[f"{name}_{what}"] / sums[name]
        for name in ("tokens", "pairs")
        for what in ("loss", "right")
    }


def _leaves(batch: Any) -> list[Tensor]:
    """Return what the module takes: targets are -100 where nothing is masked."""
    targets = torch.full_like(batch["tokens"], -100)
    rows, columns = batch["mask"].nonzero(as_tuple=True)
    targets[rows, batch["places"][rows, columns]] = batch["targets"][rows, columns]
    batch = {**batch, "targets": targets}
    return [batch[name] for name in LEAVES]


if __name__ == "__main__":
    main()
