"""Laws of sentence pairs: pure in (seed, t), half follow, no empty part, every chunk once per epoch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functrain import data
from functrain.data.pretraining.pairs import _cut
from functrain.data.pretraining.sentences import split_sentences

LAW = settings(deadline=None, derandomize=True, max_examples=40)
CLS, SEP, PAD = 0, 1, 2


class Words:
    """A tokenizer of numbers: each word is its own token, above the special ones."""

    vocab_size, end, lossless, fingerprint = 10_000, SEP, False, "words"
    special = data.SpecialTokens(cls=CLS, sep=SEP, pad=PAD, mask=3, ids=(0, 1, 2, 3))

    def encode(self, text):
        return np.array([int(word) for word in text.split()], np.uint16)

    def decode(self, ids):
        return " ".join(map(str, ids))

    def save(self, path):
        raise NotImplementedError


@st.composite
def corpora(draw):
    """Documents of numbered words, no number twice: [[sentence, ...], ...], two of two sentences at least."""
    lengths = draw(st.lists(st.lists(st.integers(0, 9), max_size=9), min_size=2, max_size=8))
    lengths += [[1, 2], [3, 1, 4]]
    numbers = iter(range(4, 10_000))
    return [[" ".join(str(next(numbers)) for _ in range(n)) for n in document] for document in lengths]


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def rows_of(batch):
    """(first part, second part, label) of each row, after checking what surrounds them."""
    for tokens, types, mask, label in zip(*(batch[name] for name in FIELDS), strict=True):
        size = int(mask.sum())
        assert mask[:size].all() and (tokens[size:] == PAD).all() and not types[size:].any()
        ids = tokens[:size].tolist()
        assert ids[0] == CLS and ids[-1] == SEP and ids.count(SEP) == 2 and ids.count(CLS) == 1
        at = ids.index(SEP)
        assert types[:size].tolist() == [0] * (at + 1) + [1] * (size - at - 1)
        assert ids[1:at] and ids[at + 1 : -1]  # neither is empty
        yield ids[1:at], ids[at + 1 : -1], int(label)


FIELDS = ("tokens", "token_types", "attention_mask", "next_sentence")


@LAW
@given(documents=corpora(), batch=st.integers(1, 5), context=st.integers(5, 30), seed=st.integers(0, 2**64 - 1))
def test_a_second_part_follows_or_is_of_another_document(documents, batch, context, seed):
    words = {
        int(word): (d, sum(len(s.split()) for s in document[:i]) + j)
        for d, document in enumerate(documents)
        for i, sentence in enumerate(document)
        for j, word in enumerate(sentence.split())
    }
    begins = {int(s.split()[0]) for document in documents for s in document if s}
    pairs = data.sentence_pairs(documents, Words(), batch=batch, context=context, seed=seed, epochs=3)
    shown = 0
    for made in pairs:
        assert all(made[name].shape == (len(made["tokens"]), context) for name in FIELDS[:3])
        for first, second, label in rows_of(made):
            shown += 1
            for part in (first, second):  # tokens of one document, side by side
                places = [words[id] for id in part]
                assert places == [(places[0][0], places[0][1] + i) for i in range(len(part))]
            assert second[0] in begins
            (document, place), (other, beginning) = words[first[-1]], words[second[0]]
            assert (other, beginning) == (document, place + 1) if label == 0 else other != document
    assert shown == 3 * len(pairs.chunks.first)


@LAW
@given(documents=corpora(), batch=st.integers(1, 5), context=st.integers(5, 30), seed=st.integers(0, 2**64 - 1))
def test_chunks_hold_every_sentence_once_and_an_epoch_every_chunk_once(documents, batch, context, seed):
    pairs = data.sentence_pairs(documents, Words(), batch=batch, context=context, seed=seed, epochs=1)
    kept = [[s for s in document if s] for document in documents]
    kept = [document for document in kept if len(document) > 1]
    chunks = list(zip(*(column.tolist() for column in pairs.chunks), strict=True))
    assert [s for first, stop, _ in chunks for s in range(first, stop)] == list(range(sum(map(len, kept))))
    assert all(stop - first >= 2 for first, stop, _ in chunks)
    sizes = [len(s.split()) for document in kept for s in document]
    borders = set(np.cumsum([len(document) for document in kept]).tolist())
    for first, stop, _ in chunks:  # as few sentences as fill a row, but for two at least and one left over
        assert sum(sizes[first:stop]) >= context - 3 or stop in borders
        assert sum(sizes[first : stop - 1]) < context - 3 or stop - first == 2 or stop in borders
    met = [chunk for t in range(len(pairs)) for chunk in pairs.order.indices(t).tolist()]
    assert sorted(met) == list(range(len(chunks)))


@LAW
@given(documents=corpora(), batch=st.integers(1, 5), seed=st.integers(0, 2**64 - 1), t=st.integers(0, 2**50))
def test_a_batch_is_a_pure_function_of_seed_and_step_and_rows_not_of_the_batch_size(documents, batch, seed, t):
    arguments = {"context": 16, "seed": seed}
    pairs = data.sentence_pairs(documents, Words(), batch=batch, **arguments)
    kept = {name: x.clone() for name, x in pairs[t].items()}
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    pairs[t + 1]
    assert same(pairs[np.int64(t)], kept)
    assert same(data.sentence_pairs(documents, Words(), batch=batch, **arguments)[t], kept)
    one = data.sentence_pairs(documents, Words(), batch=1, **arguments)
    for row in range(batch):
        assert all(torch.equal(one[t * batch + row][name][0], kept[name][row]) for name in kept)
    assert torch.equal(torch.get_rng_state(), state[0]) and np.array_equal(np.random.get_state()[1], state[1])


@LAW
@given(a=st.integers(1, 50), b=st.integers(1, 50), room=st.integers(2, 60))
def test_the_longer_part_is_cut_until_both_fit(a, b, room):
    left, right = a, b
    while left + right > room:
        left, right = (left - 1, right) if left > right or left == right and room % 2 == 0 else (left, right - 1)
    found = [int(x[0]) for x in _cut(np.array([a]), np.array([b]), room)]
    assert sum(found) == min(room, a + b) and abs(found[0] - left) <= 1 and min(found) >= 1


def corpus(documents=400, sentences=12):
    numbers = np.random.default_rng(0)
    return [
        [" ".join(map(str, numbers.integers(4, 10_000, numbers.integers(3, 15)))) for _ in range(sentences)]
        for _ in range(documents)
    ]


def test_half_follow_anew_in_each_epoch_and_lengths_do_not_tell_which():
    pairs = data.sentence_pairs(corpus(), Words(), batch=100, context=40, seed=0)
    batches = [pairs[t] for t in range(100)]
    labels = torch.cat([batch["next_sentence"] for batch in batches])
    assert abs(int(labels.sum()) - 5000) < 5 * 50  # five standard deviations
    sizes = torch.cat([batch["attention_mask"].sum(1) for batch in batches]).double()
    first = torch.cat([(batch["tokens"] == SEP).long().argmax(1) for batch in batches]).double()
    for values in (sizes, first):  # two means of 5,000 differ by five standard deviations once in millions
        off = values[labels == 0].mean() - values[labels == 1].mean()
        assert abs(off) < 5 * values.std() * (2 / 5000) ** 0.5
    per_epoch = len(pairs.chunks.first)
    assert pairs.steps_per_epoch == per_epoch / 100
    by_chunk: dict[int, set[int]] = {}
    for t in range(100):
        for chunk, label in zip(pairs.order.indices(t).tolist(), batches[t]["next_sentence"].tolist(), strict=True):
            by_chunk.setdefault(chunk, set()).add(label)
    assert len(by_chunk) == per_epoch and sum(len(seen) == 2 for seen in by_chunk.values()) > 0.8 * per_epoch


def test_other_documents_are_drawn_uniformly():
    documents = [[f"{10 * d + 4} {10 * d + 5}", f"{10 * d + 6}"] for d in range(20)]
    pairs = data.sentence_pairs(documents, Words(), batch=1000, context=8, seed=0)
    found = [(first[0] // 10, second[0] // 10) for t in range(8) for first, second, label in rows_of(pairs[t]) if label]
    counts = np.bincount([(other - own) % 20 for own, other in found], minlength=20)
    assert counts[0] == 0
    expected = len(found) / 19
    # chi square with 18 degrees of freedom: 51 is exceeded once in 20,000
    assert ((counts[1:] - expected) ** 2 / expected).sum() < 51


def test_a_corpus_is_split_into_sentences_and_masked(tmp_path):
    pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    texts = [
        "To be. Or not to be?\nThat is the question",
        "Whether 'tis nobler. In the mind! To suffer",
        "One sentence",
    ]
    given = data.Corpus("x", "train", tuple(data.Document(str(i), text) for i, text in enumerate(texts)), "f")
    tokenizer = data.train_wordpiece(given, vocab_size=120)
    arguments = {"batch": 4, "context": 24, "seed": 0}
    pairs = data.sentence_pairs(given, tokenizer, **arguments)
    listed = data.sentence_pairs([split_sentences(text) for text in texts], tokenizer, **arguments)
    assert same(pairs[3], listed[3]) and pairs.fingerprint == listed.fingerprint
    assert same(data.sentence_pairs(given, tokenizer, split=split_sentences, **arguments)[3], pairs[3])
    assert len(pairs.sentences.documents) == 3  # of two documents: the third has one sentence
    masked = data.masked(pairs, tokenizer, seed=1, rate=0.5)[3]
    assert torch.equal(masked["targets"], pairs[3]["tokens"]) and masked["mask"].any()
    assert (
        not masked["mask"][~masked["attention_mask"]].any() and (masked["tokens"][:, 0] == tokenizer.special.cls).all()
    )
    assert torch.equal(masked["next_sentence"], pairs[3]["next_sentence"])


def test_sentences_end_at_marks_before_a_space_and_at_line_breaks():
    assert split_sentences("A b. C? D! e 1.5 x.y\n\n  F\r\nG.") == ["A b.", "C?", "D!", "e 1.5 x.y", "F", "G."]
    assert split_sentences("") == split_sentences(" \n ") == []


def test_ranks_workers_and_the_fingerprint():
    made = data.sentence_pairs(corpus(9, 5), Words(), batch=4, context=30, seed=0)
    parts = [data.shard(made, rank=rank, world=2)[5] for rank in range(2)]
    assert all(torch.equal(torch.cat([part[name] for part in parts]), made[5][name]) for name in parts[0])
    assert same(next(data.prefetch(made, 5, 6)), made[5])
    arguments = {"batch": 4, "context": 30, "seed": 0}
    others = [
        data.sentence_pairs(corpus(9, 5), Words(), **arguments | change)
        for change in ({}, {"batch": 5}, {"context": 31}, {"seed": 1})
    ]
    others.append(data.sentence_pairs(corpus(9, 6), Words(), **arguments))
    assert len({pairs.fingerprint for pairs in others}) == 5 and others[0].fingerprint == made.fingerprint
    with pytest.raises(IndexError, match="expected a step t of 0 or more, came -1"):
        made[-1]
    finite = data.sentence_pairs(corpus(9, 5), Words(), epochs=1, **arguments)
    with pytest.raises(IndexError, match=rf"a batch in \[0, {len(finite)}\)"):
        finite[len(finite)]


def test_the_order_is_fixed_for_ever():
    documents = [[f"{10 * d + s + 4}" for s in range(2 + d % 5)] for d in range(9)]
    batch = data.sentence_pairs(documents, Words(), batch=3, context=7, seed=1)[11]
    assert batch["tokens"].tolist() == [[0, 24, 25, 26, 1, 27, 1], [0, 44, 45, 46, 1, 4, 1], [0, 35, 36, 1, 37, 38, 1]]


class Unpadded(Words):
    special = data.SpecialTokens(cls=CLS, sep=SEP)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"documents": [["4", "5"]]}, ValueError, "two documents of two sentences or more.* came 1 among 1"),
        (
            {"documents": [["4", "5"], ["6"], [], ["7", ""]]},
            ValueError,
            "came 1 among 4; give more text, or another spl",
        ),
        ({"documents": []}, ValueError, "came 0 among 0"),
        ({"documents": ["4 5", "6 7"]}, TypeError, "document 0: expected a list of sentences, each a text, came str"),
        ({"documents": [["4", "5"], [[4], [5]]]}, TypeError, "document 1: expected a list of sentences"),
        ({"tokenizer": data.Bytes()}, ValueError, "came Bytes without cls, sep, pad; train one with"),
        ({"tokenizer": Unpadded()}, ValueError, "came Unpadded without pad"),
        ({"context": 4}, ValueError, "a context of 5 or more .* came batch=2, context=4"),
        ({"batch": 0}, ValueError, "batch=0"),
        ({"seed": -1}, ValueError, "expected a seed"),
        ({"epochs": 0}, ValueError, "epochs of 1 or more"),
    ],
)
def test_wrong_arguments_are_errors(change, error, message):
    arguments = {
        "documents": [["4", "5"], ["6", "7"]],
        "tokenizer": Words(),
        "batch": 2,
        "context": 8,
        "seed": 0,
    } | change
    with pytest.raises(error, match=message):
        data.sentence_pairs(arguments.pop("documents"), arguments.pop("tokenizer"), **arguments)
