"""A train step on packed rows beside one on padded rows, one document a row: the time of a real token.

    python benchmarks/packed_step.py [--rounds 5] [--attention fused,math] [--rows 8] [--layers 4] [--width 256]

Documents have log-normal lengths, median 245 tokens, and rows 512. A padded row is a document, cut at 512, and its
padding comes last, so that causal attention needs no mask for it; packed rows are those of `ft.data.packed`, with
`documents` and `positions`. A Llama with `ft.optim.adamw`, compiled and donated; the variants take turns, in each on
all of four batches. "by a mask" is the packed step where the fused kernel has the mask of all pairs, and does not go
through documents one by one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import functrain as ft
from functrain.models import llama
from functrain.nn import documents as by_documents

VOCAB, CONTEXT, BATCHES = 4096, 512, 4
Batch = dict[str, Tensor]


def texts(count: int) -> list[Any]:
    rng = np.random.default_rng(0)
    lengths = np.maximum(1, rng.lognormal(5.5, 1.2, count)).astype(int)
    return [rng.integers(1, VOCAB, length) for length in lengths]


def packed(rows: int) -> list[Batch]:
    found = ft.data.packed(texts(40 * rows), batch=rows, context=CONTEXT, seed=0, end=0)
    return [found[t] for t in range(BATCHES)]


def padded(rows: int) -> list[Batch]:
    """Make batches of rows of a document each: it is read as `ft.data.packed` reads it, and cut."""
    made = []
    documents = texts(40 * rows)
    for t in range(BATCHES):
        tokens, targets = torch.zeros(rows, CONTEXT).long(), torch.zeros(rows, CONTEXT).long()
        mask = torch.zeros(rows, CONTEXT, dtype=torch.bool)
        for row, document in enumerate(documents[t * rows : (t + 1) * rows]):
            whole = torch.from_numpy(np.concatenate([[0], document, [0]]))[: CONTEXT + 1]
            count = len(whole) - 1
            tokens[row, :count], targets[row, :count], mask[row, :count] = whole[:-1], whole[1:], True
        made.append({"tokens": tokens, "targets": targets, "mask": mask})
    return made


def stepper(config: llama.Config, batches: list[Batch]) -> Callable[[], float]:
    """Return what runs a step on each batch, and returns the last loss."""

    def loss_fn(params: Any, batch: Batch, key: Tensor) -> ft.Loss:
        more = {name: batch[name] for name in ("documents", "positions") if name in batch}
        hidden = llama.hidden(params, batch["tokens"], config, **more)
        return ft.losses.next_token_from_hidden(hidden, llama.head(params), batch["targets"], batch["mask"])

    tx, key = ft.optim.adamw(1e-4), ft.random.key(0)
    step = ft.compile(ft.train_step(loss_fn, tx), donate=True)
    state = ft.init_state(llama.init(config, key), tx, key=key)

    def run() -> float:
        nonlocal state
        for batch in batches:
            state, metrics = step(state, batch)
        return float(metrics["loss"])

    return run


def by_a_mask(run: Callable[[], float]) -> Callable[[], float]:
    def masked() -> float:
        before, by_documents._SHORTEST = by_documents._SHORTEST, CONTEXT + 1
        try:
            return run()
        finally:
            by_documents._SHORTEST = before

    return masked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--attention", type=lambda names: names.split(","), default=["fused", "math"])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    options = parser.parse_args()
    rows, width = options.rows, options.width
    batches = {"padded": padded(rows), "packed": packed(rows)}
    runs: dict[str, tuple[Callable[[], float], list[Batch]]] = {}
    for attention in options.attention:
        config = llama.Config(
            vocab=VOCAB, context=CONTEXT, layers=options.layers, heads=width // 64, width=width, inner=11 * width // 4,
            tied=True, attention=attention,
        )  # fmt: skip
        for kind, found in batches.items():
            runs[f"{kind}, {attention}"] = stepper(config, found), found
        if attention == "fused":
            runs["packed, fused, by a mask"] = by_a_mask(stepper(config, batches["packed"])), batches["packed"]
    for run, _ in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, (run, found) in runs.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) / sum(int(batch["mask"].sum()) for batch in found))
    middle = {name: statistics.median(values) for name, values in times.items()}
    best = min(seconds for name, seconds in middle.items() if name.startswith("padded"))
    size = f"Llama of {options.layers} layers, width {width}, batch {rows}x{CONTEXT}"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {size}\n")
    print("| rows | real tokens | documents a row | us a real token | spread | to the best of padded |")
    print(f"|{'---|' * 6}")
    for name, (_, found) in runs.items():
        real = statistics.mean(float(batch["mask"].float().mean()) for batch in found)
        each = [documents_in(batch) / rows for batch in found]
        low, high = min(times[name]) * 1e6, max(times[name]) * 1e6
        print(f"| {name} | {real:.1%} | {statistics.mean(each):.1f} | {middle[name] * 1e6:.1f} | {low:.1f}-{high:.1f} "
              f"| {middle[name] / best:.3f} |")  # fmt: skip


def documents_in(batch: Batch) -> int:
    if "documents" not in batch:
        return len(batch["tokens"])
    return int((batch["positions"] == 0)[batch["mask"]].sum())


if __name__ == "__main__":
    main()
