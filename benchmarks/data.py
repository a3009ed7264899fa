"""Time what the data room does in a run: reading, encoding, making one batch.

`python benchmarks/data.py` prints a table; each number is the best of five.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from functrain import data


def seconds(fn: Callable[[], Any], repeat: int) -> float:
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeat):
            fn()
        best = min(best, (time.perf_counter() - start) / repeat)
    return best


def each(batches: Any, steps: int) -> float:
    """Seconds a batch takes when steps follow one another."""
    t = iter(range(10**9))
    return seconds(lambda: batches[next(t)], steps)


def main() -> None:
    torch.set_num_threads(1)
    train = data.corpus("python")
    size = data.tokenize(train).size_bytes
    print(f"corpus('python'): {size / 1e6:.2f} MB in {len(train.documents)} documents, fingerprint {train.fingerprint}")
    print(f"{'read and split':40} {seconds(lambda: data.corpus('python'), 1) * 1e3:8.1f} ms")
    print(f"{'encode as bytes':40} {seconds(lambda: data.tokenize(train), 1) * 1e3:8.1f} ms")
    with tempfile.TemporaryDirectory() as folder:
        tokens = data.tokenize(train, folder=folder)
        print(f"{'open the token file':40} {seconds(lambda: data.tokenize(train, folder=folder), 1) * 1e3:8.1f} ms")
        for batch, context in ((12, 64), (16, 128), (8, 1024), (64, 1024)):
            shuffled = data.windows(tokens, batch=batch, context=context, seed=0)
            drawn = data.crops(tokens, batch=batch, context=context, seed=0)
            evaluation = data.evaluation_windows(tokens, batch=batch, context=context)
            for name, batches, steps in (
                ("windows", shuffled, 1000),
                ("crops", drawn, 1000),
                ("evaluation", evaluation, 20),
            ):
                print(f"{f'{name} ({batch}, {context})':40} {each(batches, steps) * 1e6:8.1f} us")
        windows = data.windows(tokens, batch=12, context=64, seed=0)

        def drain() -> None:
            for _ in data.prefetch(windows, 0, 2000):
                pass

        print(f"{'prefetch (12, 64), nothing else to do':40} {seconds(drain, 1) / 2000 * 1e6:8.1f} us")
    start = time.perf_counter()
    bpe = data.train_bpe(train, vocab_size=4096)
    print(f"{'train_bpe 4096':40} {time.perf_counter() - start:8.1f} s")
    start = time.perf_counter()
    tokens = data.tokenize(train, bpe)
    print(f"{'encode with it':40} {time.perf_counter() - start:8.1f} s, {tokens.bytes_per_token:.3f} bytes per token")


if __name__ == "__main__":
    main()
