"""Laws of packed rows: pure in (seed, t), every token a target once, whole documents, little padding."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from functrain import data
from functrain.data.pretraining.packing import best_fit

LAW = settings(deadline=None, derandomize=True, max_examples=60)
SEEDS = st.integers(0, 2**64 - 1)
DOCUMENTS = st.lists(st.lists(st.integers(2, 999), max_size=30), min_size=1, max_size=12).filter(any)
END = 1


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def cells_of(batches):
    """{(document, its cells in the order of their positions): ...} of a finite row of batches, as (token, target)."""
    found = []
    for batch in batches:
        for row in range(len(batch["tokens"])):
            columns = [batch[name][row].tolist() for name in ("documents", "positions", "tokens", "targets", "mask")]
            found += [cell for cell in zip(*columns, strict=True)]
    return found


def pieces_of(batches):
    """(document, [(token, target), ...]) for each piece, in the order of the cells."""
    found = []
    for document, position, token, target, mask in cells_of(batches):
        assert mask == (document >= 0)
        if document < 0:
            assert (position, token, target) == (0, 0, 0)
        elif position == 0:
            found.append((document, [(token, target)]))
        else:
            assert found[-1][0] == document and len(found[-1][1]) == position  # cells of a piece lie side by side
            found[-1][1].append((token, target))
    return found


def fullest_first(lengths, room):
    """Best fit decreasing, one piece after another."""
    left = []
    for length in sorted(lengths, reverse=True):
        fits = [row for row in range(len(left)) if left[row] >= length]
        if fits:
            left[min(fits, key=left.__getitem__)] -= length
        else:
            left.append(room - length)
    return left


@LAW
@given(lengths=st.lists(st.integers(1, 17), max_size=80), room=st.integers(17, 40))
@example(lengths=[], room=5)
@example(lengths=[3] * 7, room=9)
def test_rows_are_those_of_best_fit_decreasing(lengths, room):
    rows = best_fit(np.array(lengths, np.int64), room)
    filled = np.bincount(rows, weights=lengths) if lengths else np.zeros(0)
    assert sorted(room - filled) == sorted(fullest_first(lengths, room)) and (filled > 0).all()


@LAW
@given(documents=DOCUMENTS, batch=st.integers(1, 5), context=st.integers(1, 40), seed=SEEDS)
def test_every_token_and_every_end_is_a_target_once_in_an_epoch(documents, batch, context, seed):
    for begin in (END, 0):
        one = data.packed(documents, batch=batch, context=context, seed=seed, begin=begin, end=END, epochs=1)
        read = [[begin, *document, END] for document in documents]
        whole = {i: list(zip(ids, ids[1:], strict=False)) for i, ids in enumerate(read) if len(ids) > 2}
        met = pieces_of(one)
        for document, cells in whole.items():
            cuts = [cells[i : i + context] for i in range(0, len(cells), context)]  # one piece where it fits a row
            assert sorted(piece for number, piece in met if number == document) == sorted(cuts)
        assert {number for number, _ in met} == set(whole)


@LAW
@given(documents=DOCUMENTS, batch=st.integers(1, 5), context=st.integers(1, 40), seed=SEEDS, t=st.integers(0, 2**40))
def test_a_batch_is_a_pure_function_of_seed_and_step(documents, batch, context, seed, t):
    arguments = {"batch": batch, "context": context, "seed": seed, "end": END}
    batches = data.packed(documents, **arguments)
    made = batches[t]
    kept = {name: x.clone() for name, x in made.items()}
    for x in made.values():
        x.zero_()
    assert same(batches[t], kept) and same(pickle.loads(pickle.dumps(batches))[np.int64(t)], kept)
    again = data.packed([np.array(document, np.uint16) for document in documents], **arguments)
    assert same(again[t], kept)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    batches[t]
    assert torch.equal(state[0], torch.get_rng_state()) and np.array_equal(state[1], np.random.get_state()[1])
    assert all(x.shape == (batch, context) and x.is_contiguous() for x in kept.values())
    assert {x.dtype for name, x in kept.items() if name != "mask"} == {torch.int64} and kept["mask"].dtype == torch.bool


@LAW
@given(documents=DOCUMENTS, batch=st.integers(1, 5), context=st.integers(1, 40), seed=SEEDS)
def test_the_order_of_rows_does_not_depend_on_the_batch_size(documents, batch, context, seed):
    one, several = (
        data.packed(documents, batch=size, context=context, seed=seed, end=END, epochs=2) for size in (1, batch)
    )
    assert cells_of(several) == cells_of(one)


def test_a_list_without_an_end_gives_no_target_to_first_tokens():
    documents = [[5, 6, 7], [8], [], [3, 4]]
    met = sorted(pieces_of(data.packed(documents, batch=1, context=4, seed=0, epochs=1)))
    assert met == [(0, [(5, 6), (6, 7)]), (3, [(3, 4)])]


def test_a_corpus_its_tokens_and_a_list_give_the_same_batches(tmp_path):
    corpus = data.corpus("python", split="validation")
    arguments = {"batch": 8, "context": 300, "seed": 3}
    made = [
        data.packed(corpus, **arguments),
        data.packed(corpus, tokenizer=data.Bytes(), **arguments),
        data.packed(data.tokenize(corpus, folder=tmp_path), end=0, **arguments),
        data.packed(torch.from_numpy(data.tokenize(corpus).ids.astype(np.int64)), end=0, **arguments),
        data.packed([data.Bytes().encode(document.text) for document in corpus.documents], end=0, **arguments),
    ]
    for other in made[1:]:
        assert same(other[7], made[0][7]) and same(other[10_000], made[0][10_000])
    batches = (made[0][t] for t in range(1000))
    targets, of = next(
        (batch["targets"][row], batch["documents"][row])
        for batch in batches for row in range(8) if len(batch["documents"][row].unique()) > 2
    )  # fmt: skip
    for document in set(of.tolist()) - {-1}:
        text = data.Bytes().decode(targets[of == document])
        assert text[-1] == data.END and corpus.documents[document].text.endswith(text[:-1].strip("\ufffd"))


def test_padding_is_under_three_percent_of_pythons_sources_and_shown():
    batches = data.packed(data.corpus("python"), batch=64, context=512, seed=0, epochs=1)
    empty = sum(int((~batch["mask"]).sum()) for batch in batches)
    assert batches.source.padding == pytest.approx(empty / (512 * batches.source.rows))
    assert 0.0 < batches.source.padding < 0.03


def test_documents_shorter_than_a_row_lie_in_it_whole_and_beside_others():
    rng = np.random.default_rng(0)
    documents = [rng.integers(2, 99, n) for n in rng.integers(1, 40, 500)]
    batches = data.packed(documents, batch=10, context=64, seed=0, end=END, epochs=1)
    assert len(pieces_of(batches)) == 500 and batches.source.padding < 0.03
    # neighbours in the list are no neighbours in rows: of 500 documents, few rows hold two
    together = [set(row.tolist()) - {-1} for batch in batches for row in batch["documents"]]
    assert sum(n + 1 in row for row in together for n in row) < 20


def test_rows_are_cut_into_ranks_and_read_ahead():
    batches = data.packed([[5, 6, 7], [8, 9], [3, 4, 2, 2]] * 9, batch=4, context=8, seed=0, end=END)
    parts = [data.shard(batches, rank=rank, world=2)[5] for rank in range(2)]
    assert all(torch.equal(torch.cat([part[name] for part in parts]), batches[5][name]) for name in parts[0])
    ahead = list(data.prefetch(batches, 3, 6, workers=2))
    assert all(same(ahead[i], batches[3 + i]) for i in range(3))


def test_the_fingerprint_changes_with_everything_that_changes_a_batch():
    documents, arguments = [[5, 6, 7], [8, 9], [3]], {"batch": 2, "context": 5, "seed": 2, "end": 1}
    made = [
        data.packed(documents, **arguments),
        data.packed([[5, 6], [7, 8, 9], [3]], **arguments),
        data.packed([[5, 6, 7], [8, 9], [4]], **arguments),
        *(
            data.packed(documents, **arguments | change)
            for change in ({"batch": 3}, {"context": 6}, {"seed": 3}, {"end": 2}, {"begin": 2})
        ),
    ]
    assert len({batches.fingerprint for batches in made}) == len(made)
    assert made[0].fingerprint == data.packed(documents, **arguments, epochs=3).fingerprint


def test_the_order_is_fixed_for_ever():
    # a resumed run on another machine or another numpy must see the same rows
    documents = [[10 * i + j for j in range(1 + i % 7)] for i in range(1, 40)]
    batch = data.packed(documents, batch=3, context=9, seed=1, end=0)[11]
    assert batch["documents"][:, [0, -1]].tolist() == [[19, -1], [29, 23], [5, -1]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"documents": []}, ValueError, "expected documents, came 0 with tokens"),
        ({"documents": [[], []]}, ValueError, "expected documents, came 2 with tokens"),
        ({"documents": [[3], [4]]}, ValueError, "two tokens or more.*give end="),
        ({"documents": [[3, 4], [5, -1]]}, ValueError, "document 1: expected tokens of 0 or more, came -1"),
        ({"documents": [[3, 4], [0.5]]}, ValueError, r"document 1: expected one row of integers, came \(1,\) of float"),
        ({"documents": "text"}, TypeError, "came str"),
        ({"documents": np.arange(9)}, ValueError, "expected end=, the token that stands between two documents"),
        ({"documents": data.tokenize(data.Corpus("x", "train", (data.Document("a", "ab"),), "f")), "end": 256},
         ValueError, r"end to be a token in \[0, 256\), came 256"),
        ({"end": -1}, ValueError, "end to be a token in 0 or more, came -1"),
        ({"begin": 3}, ValueError, "begin=3 needs an end="),
        ({"tokenizer": data.Bytes()}, ValueError, "these are tokens already"),
        ({"context": 0}, ValueError, "context=0"),
        ({"batch": 0}, ValueError, "batch=0"),
        ({"seed": -1}, ValueError, "expected a seed"),
        ({"epochs": 0}, ValueError, "epochs of 1 or more, came 0"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_errors(change, error, message):
    arguments = {"documents": [[5, 6, 7], [8, 9]], "batch": 2, "context": 4, "seed": 0} | change
    with pytest.raises(error, match=message):
        data.packed(arguments.pop("documents"), **arguments)


def test_a_tokenizer_without_an_end_is_an_error():
    corpus = data.Corpus("x", "train", (data.Document("a", "ab"),), "f")
    with pytest.raises(ValueError, match="Characters has no token for the end of a document"):
        data.packed(corpus, tokenizer=data.Characters("ab"), batch=1, context=4, seed=0)
    assert data.packed(corpus, tokenizer=data.Characters("abz"), end=2, batch=1, context=4, seed=0)[0] is not None
