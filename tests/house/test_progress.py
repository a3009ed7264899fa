"""Whatever takes long tells how far it is, through one kind of callback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import functrain as ft
from functrain.models import gpt2

CONFIG = gpt2.Config(vocab=16, context=8, layers=2, heads=2, width=8)
KEY, PROMPT = ft.random.key(0), torch.zeros(1, 2, dtype=torch.int64)
PARAMS = gpt2.init(CONFIG, ft.random.key(0))
CORPUS = ft.data.Corpus("x", "train", tuple(ft.data.Document(str(i), "the cat sat\n" * 20) for i in range(5)), "f")
WORDPIECE = ft.data.train_wordpiece(CORPUS, vocab_size=40)
BYTES = ft.tree.bytes(PARAMS)
CHARACTERS = 5 * 240


def paired(**more: Any) -> Any:
    return ft.data.sentence_pairs(CORPUS, WORDPIECE, batch=2, context=8, seed=0, **more)


def exported(folder: Path) -> Path:
    return gpt2.to_hf(folder / "model", PARAMS, CONFIG)


LONG: dict[str, tuple[Callable[[Path, Any], Any], int | None, int]] = {
    "load": (lambda d, p: ft.checkpoint.load(ft.checkpoint.save(d / "c", PARAMS), progress=p), BYTES, 20),
    "load like": (
        lambda d, p: ft.checkpoint.load(ft.checkpoint.save(d / "c", PARAMS), like=PARAMS, progress=p), BYTES, 20,
    ),
    "load at": (
        lambda d, p: ft.checkpoint.load(ft.checkpoint.save(d / "c", {"a": PARAMS, "b": KEY}), at="a", progress=p),
        BYTES, 20,
    ),
    "verify": (lambda d, p: ft.checkpoint.verify(ft.checkpoint.save(d / "c", PARAMS), progress=p), None, 20),
    "load_folder": (lambda d, p: ft.checkpoint.load_folder(exported(d), progress=p), None, 20),
    "from_hf": (lambda d, p: gpt2.from_hf(exported(d), progress=p), None, 20),
    "to_hf": (lambda d, p: gpt2.to_hf(d / "model", PARAMS, CONFIG, progress=p), BYTES, 20),
    "train_bpe": (lambda d, p: ft.data.train_bpe(CORPUS, vocab_size=260, progress=p), CHARACTERS, 6),
    "train_wordpiece": (lambda d, p: ft.data.train_wordpiece(CORPUS, vocab_size=40, progress=p), CHARACTERS, 6),
    "tokenize": (lambda d, p: ft.data.tokenize(CORPUS, progress=p), CHARACTERS, 6),
    "tokenize into a folder": (lambda d, p: ft.data.tokenize(CORPUS, folder=d, progress=p), CHARACTERS, 6),
    "sentence_pairs": (lambda d, p: paired(progress=p), CHARACTERS, 6),
    "sentence_pairs into a folder": (lambda d, p: paired(folder=d, progress=p), CHARACTERS, 6),
    "generate": (
        lambda d, p: ft.generate(gpt2, PARAMS, PROMPT, CONFIG, steps=7, temperature=0, progress=p),
        7, 8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LONG)
def test_what_takes_long_tells_how_far_it_is_from_nothing_to_all(name: str, tmp_path: Path) -> None:
    call, total, times = LONG[name]
    seen: list[tuple[int, int | None]] = []
    call(tmp_path, lambda done, of: seen.append((done, of)))
    done = [row[0] for row in seen]
    assert done[0] == 0 and done == sorted(done) and {row[1] for row in seen} == {done[-1]} and len(seen) >= times
    assert total is None or done[-1] == total


@pytest.mark.parametrize("name", LONG)
def test_a_callback_that_raises_ends_it_and_leaves_no_part(name: str, tmp_path: Path) -> None:
    def stop(done: int, total: int | None) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LONG[name][0](tmp_path, stop)
    if name in ("to_hf", "tokenize into a folder", "sentence_pairs into a folder"):
        assert list(tmp_path.iterdir()) == []
