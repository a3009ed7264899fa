"""Measure batches for pre-training: the padding of packed rows, the time of a plan, and of a batch beside `windows`.

`python benchmarks/packing.py` prints a table. Times are CPU time of one thread; a batch is 16 rows of 512 tokens, and
each number the median of 15 interleaved rounds of 40 batches.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch

from functrain import data

BATCH, CONTEXT = 16, 512


def main() -> None:
    torch.set_num_threads(1)
    corpus = data.corpus("python")
    bpe = data.train_bpe(corpus, vocab_size=4096)
    encoded = {"bytes": data.Bytes(), "BPE of 4096": bpe}
    print("corpus('python'), padding as a share of all cells\n")
    for name, tokenizer in encoded.items():
        documents = [tokenizer.encode(document.text) for document in corpus.documents]
        for context in (512, 2048):
            rows = data.packed(documents, batch=BATCH, context=context, seed=0, end=tokenizer.end).source
            alone = sum(-(-(len(document) + 1) // context) for document in documents)
            cells = sum(len(document) + 1 for document in documents)
            share = 1 - cells / (alone * context)
            print(f"{f'{name}, context {context}':32} {rows.padding:8.3%}  one document a row {share:7.2%}")

    print("\n1,000,000 documents of log-normal lengths, median 245 tokens\n")
    lengths = np.maximum(1, np.random.default_rng(0).lognormal(5.5, 1.2, 1_000_000)).astype(int)
    ids = np.ones(lengths.sum() + len(lengths), np.uint16)
    ids[np.cumsum(lengths + 1) - 1] = 0
    many = data.Tokens(ids[:-1], 2, len(ids) - 1, "corpus", "tokenizer")
    for context in (512, 2048, 8192):
        start = time.process_time()
        rows = data.packed(many, batch=BATCH, context=context, seed=0, end=0).source
        print(f"{f'plan, context {context}':32} {time.process_time() - start:8.2f} s, padding {rows.padding:.3%}")

    print(f"\nBatches of ({BATCH}, {CONTEXT})\n")
    tokens, end = data.tokenize(corpus, bpe), bpe.end
    wordpiece = data.train_wordpiece(corpus, vocab_size=4096)
    flat = data.windows(corpus, batch=BATCH, context=CONTEXT, seed=0, tokenizer=wordpiece)
    with tempfile.TemporaryDirectory() as folder:
        for what, kept in (("plan and encode the pairs", None), ("into a file", folder), ("out of it", folder)):
            start = time.process_time()
            pairs = data.sentence_pairs(corpus, wordpiece, batch=BATCH, context=CONTEXT, seed=0, folder=kept)
            print(f"{what:32} {time.process_time() - start:8.2f} s for {len(tokens.ids):,} tokens")
    print()
    made: dict[str, Any] = {
        "windows": data.windows(tokens, batch=BATCH, context=CONTEXT, seed=0),
        "packed": data.packed(tokens, batch=BATCH, context=CONTEXT, seed=0, end=end),
        "windows, masked": data.masked(flat, wordpiece, seed=0),
        "windows, whole words masked": data.masked(flat, wordpiece, seed=0, whole_words=True),
        "sentence pairs": pairs,
        "sentence pairs, masked": data.masked(pairs, wordpiece, seed=0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for round_ in range(16):
        for name, batches in made.items():
            start = time.thread_time()
            for t in range(40 * round_, 40 * (round_ + 1)):
                batches[t]
            seconds[name].append((time.thread_time() - start) / 40)
    for name, found in seconds.items():
        median = statistics.median(found[1:])
        print(f"{name:32} {median * 1e6:8.0f} us, {BATCH * CONTEXT / median / 1e6:6.1f} million tokens a second")


if __name__ == "__main__":
    main()
