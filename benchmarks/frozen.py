"""Peak memory and time of a step with most params frozen, beside one that trains all, and beside zeroed updates.

    python benchmarks/frozen.py [--only eager|compiled] [--rounds 5]

A GPT whose last layer norm and head are trained: `trainable=`, against `ft.optim.freeze`, which computes all gradients
and makes the updates zero. Peak is what torch's allocator held at most in one call, above what it held before it.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from step import peak_bytes, seconds_by_turns

import functrain as ft
from functrain.models import gpt2

CONFIG = gpt2.Config(vocab=256, context=64, layers=4, heads=4, width=128)
HEAD = ["ln_f/**", "head/**"]
KEY = ft.random.key(0)


def loss_fn(params: Any, batch: Any, key: Any) -> ft.Loss:
    x = params["body"]
    logits = gpt2.apply(x, batch["tokens"], CONFIG)  # (B, T, V)
    logits = ft.nn.linear(ft.nn.layer_norm(logits, **params["ln_f"]), **params["head"])  # (B, T, V)
    return ft.losses.next_token(logits, batch["targets"], batch["mask"])


def init() -> Any:
    vocab = CONFIG.vocab
    head = {"weight": torch.eye(vocab), "bias": torch.zeros(vocab)}
    norm = {"weight": torch.ones(vocab), "bias": torch.zeros(vocab)}
    return {"body": gpt2.init(CONFIG, KEY), "ln_f": norm, "head": head}


def batch() -> Any:
    tokens = ft.random.randint(KEY, (8, CONFIG.context), 0, CONFIG.vocab)
    return {"tokens": tokens, "targets": tokens.roll(-1, 1), "mask": torch.ones(tokens.shape)}


def variants(compiled: bool) -> dict[str, tuple[Any, int]]:
    """Return, for each, the function that takes a step, and the bytes of its optimizer's state."""
    adamw = ft.optim.adamw(1e-3)
    zeroed = ft.optim.chain(adamw, ft.optim.freeze(lambda params: ft.tree.mask("body/**", params)))
    made = {
        "all trained": (adamw, None),
        "updates zeroed by ft.optim.freeze": (zeroed, None),
        "trainable=": (adamw, HEAD),
    }
    found = {}
    for name, (tx, trainable) in made.items():
        step = ft.train_step(loss_fn, tx, trainable=trainable)
        state = ft.init_state(init(), tx, key=KEY, trainable=trainable)
        held = sum(leaf.nbytes for leaf in ft.tree.leaves(state.opt_state))
        found[name] = _stepping(ft.compile(step, donate=True) if compiled else step, state, batch()), held
    return found


def _stepping(step: Any, state: Any, data: Any) -> Any:
    def run() -> Any:
        nonlocal state
        state, metrics = step(state, data)
        return metrics["loss"]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("eager", "compiled"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {CONFIG}")
    for way in ("eager", "compiled"):
        if options.only not in (None, way):
            continue
        made = variants(way == "compiled")
        for run, _ in made.values():
            run(), run()
        seconds = seconds_by_turns({name: run for name, (run, _) in made.items()}, options.rounds)
        print(f"\n{way}\n\n| | ms | of the first | peak MB | optimizer's state MB |\n|---|---|---|---|---|")
        base = seconds["all trained"]
        for name, (run, held) in made.items():
            ms, peak = seconds[name] * 1e3, peak_bytes(run) / 1e6
            print(f"| {name} | {ms:.1f} | {seconds[name] / base:.2f} | {peak:.2f} | {held / 1e6:.2f} |", flush=True)


if __name__ == "__main__":
    main()
