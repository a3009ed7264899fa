"""Sentences are encoded once into a file, which is whole or not there, and proves what it holds."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functrain import data
from functrain.data import atomic
from functrain.data.text import _fingerprint

LAW = settings(deadline=None, derandomize=True, max_examples=40)
TEXTS = ["4 5.\n6 7 8", "9\n10 11\n12", "one sentence", "13\n14"]


class Words:
    """A tokenizer of numbers, which counts what it encodes."""

    vocab_size, end, lossless, fingerprint = 300, 1, False, "words"
    special = data.SpecialTokens(cls=0, sep=1, pad=2, mask=3, ids=(0, 1, 2, 3))

    def __init__(self):
        self.calls = 0

    def encode(self, text):
        self.calls += 1
        return np.array([int(word.strip(".")) for word in text.split() if word.strip(".").isdecimal()], np.uint16)

    def decode(self, ids):
        return " ".join(map(str, ids))

    def save(self, path):
        raise NotImplementedError


def corpus_of(texts, split="train"):
    documents = tuple(data.Document(f"{i:03}", text) for i, text in enumerate(texts))
    return data.Corpus("mine", split, documents, _fingerprint(documents))


def pairs(source, tokenizer=None, **more):
    return data.sentence_pairs(source, tokenizer or Words(), batch=2, context=9, seed=0, **more)


def test_pairs_of_a_file_are_those_of_the_text_and_it_is_written_once(tmp_path):
    kept, plain = Words(), pairs(corpus_of(TEXTS))
    for _ in range(2):
        found = pairs(corpus_of(TEXTS), kept, folder=tmp_path)
        assert found.fingerprint == plain.fingerprint
        assert all(torch.equal(found[5][name], leaf) for name, leaf in plain[5].items())
    assert kept.calls == 8
    # another text, side, tokenizer
    pairs(corpus_of([*TEXTS, "15\n16"]), kept, folder=tmp_path)
    pairs(corpus_of(TEXTS, "validation"), kept, folder=tmp_path)
    other = Words()
    other.fingerprint = "others"
    pairs(corpus_of(TEXTS), other, folder=tmp_path)
    assert len(list(tmp_path.glob("sentences-train-*.bin"))) == 3
    assert len(list(tmp_path.glob("sentences-validation-*.json"))) == 1 and len(list(tmp_path.iterdir())) == 8


def test_a_write_that_stops_before_the_header_is_done_again(tmp_path, monkeypatch):
    replace = atomic.os.replace

    def stop_at_the_header(staging, path):
        if path.suffix == ".json":
            raise KeyboardInterrupt
        replace(staging, path)

    monkeypatch.setattr(atomic.os, "replace", stop_at_the_header)
    with pytest.raises(KeyboardInterrupt):
        pairs(corpus_of(TEXTS), folder=tmp_path)
    monkeypatch.undo()
    (part,) = tmp_path.iterdir()
    part.write_bytes(b"xx")
    assert pairs(corpus_of(TEXTS), folder=tmp_path).fingerprint == pairs(corpus_of(TEXTS)).fingerprint
    assert len(list(tmp_path.iterdir())) == 2


@LAW
@given(chooser=st.data())
def test_every_damage_is_noticed(tmp_path_factory, chooser):
    folder = tmp_path_factory.mktemp("tokens")
    pairs(corpus_of(TEXTS), folder=folder)
    (path,) = folder.glob("*.bin")
    content = bytearray(path.read_bytes())
    bit = chooser.draw(st.integers(0, 8 * len(content) - 1))
    flipped = content.copy()
    flipped[bit // 8] ^= 1 << bit % 8
    cut = content[: chooser.draw(st.integers(0, len(content) - 1))]
    size = 8 * (7 + 1 + 3 + 1) + 2 * 11
    for damaged, message in ((flipped, "it is damaged"), (cut, f"expected {size} bytes"), (content + b"x", "came 119")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{message}.*; delete the file and its .json") as caught:
            pairs(corpus_of(TEXTS), folder=folder)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "other"}, "expected the sentences of .*, came those of other; delete"),
        ({"tokens": 12}, "expected 120 bytes, came 118"),
        ({"vocab_size": 70000}, "expected 140 bytes"),
        ({"tokens": "11"}, "expected the fields"),
        ({"fingerprint": "f"}, "expected fingerprint f, came"),
        ({"version": 2}, "file of sentences version 2 is newer than 1; upgrade functrain"),
    ],
)
def test_a_header_that_does_not_fit_is_an_error(tmp_path, change, message):
    pairs(corpus_of(TEXTS), folder=tmp_path)
    (header,) = tmp_path.glob("*.json")
    header.write_text(json.dumps(json.loads(header.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        pairs(corpus_of(TEXTS), folder=tmp_path)


def test_what_has_no_fingerprint_is_kept_in_no_file(tmp_path):
    with pytest.raises(ValueError, match="folder: expected a Corpus and no split=, .* came list; leave out folder="):
        pairs([["4", "5"], ["6", "7"]], folder=tmp_path)
    with pytest.raises(ValueError, match="came a split of its own"):
        pairs(corpus_of(TEXTS), split=str.split, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_documents_in_a_list_are_counted():
    seen = []
    pairs([["4", "5"], ["6", "7"], ["8"]], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
