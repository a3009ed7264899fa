"""Laws of masked batches: pure in (seed, t), the shares asked for, special tokens and padding never chosen."""

import random
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functrain import data
from functrain.data.pretraining.words import word_parts

pytest.importorskip("tokenizers", reason="needs the package tokenizers")
LAW = settings(deadline=None, derandomize=True, max_examples=30)
WORDS = ["".join(parts) for parts in product(("ka", "lo", "mi", "ter", "un"), repeat=3)]  # more than a vocabulary holds
TEXT = " ".join(WORDS * 5) + ", (a.b) 世\n" * 20
CORPUS = data.Corpus("x", "train", (data.Document("a", TEXT), data.Document("b", "a question " * 20)), "f")
WORDPIECE = data.train_wordpiece(CORPUS, vocab_size=120)
BPE = data.train_bpe(CORPUS, vocab_size=300, special=["<mask>", "<pad>"])
V, MASK = WORDPIECE.vocab_size, WORDPIECE.special.mask


class Drawn:
    """Batches of tokens drawn uniformly from a vocabulary, special ones included."""

    def __init__(self, batch, context, vocab=V):
        self.shape, self.vocab = (batch, context), vocab

    def __getitem__(self, t):
        draws = np.random.Philox(key=t).random_raw(self.shape[0] * self.shape[1]) % np.uint64(self.vocab)
        return {"tokens": torch.from_numpy(draws.astype(np.int64).reshape(self.shape)), "label": torch.arange(3)}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def is_near(count, total, share, deviations=5.0):
    return abs(count - total * share) <= deviations * (total * share * (1 - share)) ** 0.5 + 1e-9


@pytest.mark.parametrize(
    "shares", [(0.15, 0.8, 0.1), (0.4, 0.5, 0.5), (0.3, 0.0, 1.0), (1.0, 1.0, 0.0), (0.2, 0.0, 0.0)]
)
def test_shares_are_those_asked_for_and_special_tokens_never_chosen(shares):
    rate, mask_share, random_share = shares
    made = data.masked(Drawn(600, 512), WORDPIECE, seed=3, rate=rate, mask_share=mask_share, random_share=random_share)
    batch, before = made[7], Drawn(600, 512)[7]
    assert torch.equal(batch["targets"], before["tokens"]) and torch.equal(batch["label"], before["label"])
    special = torch.isin(batch["targets"], torch.tensor(WORDPIECE.special.ids))
    chosen = batch["mask"]
    assert not (chosen & special).any() and torch.equal(batch["tokens"][~chosen], batch["targets"][~chosen])
    legal, total = int((~special).sum()), int(chosen.sum())
    assert legal > 280_000 and is_near(total, legal, rate)
    is_mask = batch["tokens"][chosen] == MASK
    kept = batch["tokens"][chosen] == batch["targets"][chosen]
    ordinary = V - len(WORDPIECE.special.ids)
    assert is_near(int(is_mask.sum()), total, mask_share)
    # a random token is the one that was there once in so many times
    assert is_near(int(kept.sum()), total, 1 - mask_share - random_share * (1 - 1 / ordinary))
    drawn = batch["tokens"][chosen][~is_mask & ~kept]
    counts = torch.bincount(drawn, minlength=V)
    assert not counts[list(WORDPIECE.special.ids)].any()
    if len(drawn):
        seen, expected = counts[counts > 0].double(), len(drawn) / ordinary
        assert len(seen) == ordinary
        # chi square with n degrees of freedom: mean n, variance 2 n
        assert ((seen - expected) ** 2 / expected).sum() < ordinary + 5 * (2 * ordinary) ** 0.5


def test_masks_of_two_steps_overlap_at_the_rate():
    class Same(Drawn):
        def __getitem__(self, t):
            return super().__getitem__(0)

    for whole_words in (False, True):
        made = data.masked(Same(600, 512), WORDPIECE, seed=0, whole_words=whole_words)
        first, second = made[0]["mask"], made[1]["mask"]
        other = data.masked(Same(600, 512), WORDPIECE, seed=1, whole_words=whole_words)[0]["mask"]
        for later in (second, other):
            # words are of some tokens, which are chosen together: so many more deviations
            assert is_near(int((first & later).sum()), int(first.sum()), 0.15, 15 if whole_words else 5)


@LAW
@given(seed=st.integers(0, 2**64 - 1), t=st.integers(0, 2**50), whole_words=st.booleans())
def test_a_masked_batch_is_a_pure_function_of_seed_and_step(seed, t, whole_words):
    made = data.masked(Drawn(3, 20), WORDPIECE, seed=seed, whole_words=whole_words)
    kept = {name: x.clone() for name, x in made[t].items()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    made[0], made[t + 1]
    assert same(made[t], kept)
    assert same(data.masked(Drawn(3, 20), WORDPIECE, seed=seed, whole_words=whole_words)[np.int64(t)], kept)
    assert torch.equal(torch.get_rng_state(), states[0]) and np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    assert {x.dtype for name, x in kept.items() if name != "mask"} == {torch.int64} and kept["mask"].dtype == torch.bool


@pytest.mark.parametrize("tokenizer", [WORDPIECE, BPE], ids=["wordpiece", "bpe"])
def test_whole_words_are_chosen_with_all_their_tokens(tokenizer):
    windows = data.windows(CORPUS, batch=64, context=200, seed=0, tokenizer=tokenizer)
    made = data.masked(windows, tokenizer, seed=1, whole_words=True, rate=0.3)
    parts = word_parts(tokenizer)
    chosen = words = tokens = 0
    for t in range(10):
        batch = made[t]
        ids, mask = batch["targets"].numpy(), batch["mask"].numpy()
        joined = parts.continues[ids[:, 1:]] & parts.open[ids[:, :-1]]
        assert joined.any() and (mask[:, 1:][joined] == mask[:, :-1][joined]).all()
        begins = np.concatenate([np.ones((len(ids), 1), bool), ~joined], 1)
        begins &= ~np.isin(ids, tokenizer.special.ids)
        words, chosen, tokens = words + begins.sum(), chosen + (mask & begins).sum(), tokens + mask.sum()
        # each of its tokens is treated by itself
        treated = batch["tokens"].numpy() == tokenizer.special.mask
        assert (treated[:, 1:] != treated[:, :-1])[joined & mask[:, 1:]].any()
    assert is_near(chosen, words, 0.3) and tokens > 1.1 * chosen


def test_words_end_with_their_document():
    cells = WORDPIECE.encode("unterkamiloka").astype(np.int64)
    assert len(cells) > 3 and word_parts(WORDPIECE).continues[cells[1:]].all()
    batch = {"tokens": torch.from_numpy(np.tile(cells, (500, 1))), "documents": torch.zeros(500, len(cells)).long()}
    batch["documents"][:, 2:] = 1
    found = data.masked([batch], WORDPIECE, seed=0, whole_words=True, rate=0.5)[0]["mask"]
    assert torch.equal(found[:, 0], found[:, 1]) and (found[:, 2:] == found[:, 2:3]).all()
    assert is_near(int((found[:, 1] != found[:, 2]).sum()), 500, 0.5)


def test_padding_is_never_chosen():
    packed = data.packed(CORPUS, batch=8, context=333, seed=0, tokenizer=WORDPIECE)
    made = data.masked(packed, WORDPIECE, seed=0, rate=1.0)[0]
    empty = packed[0]["documents"] < 0
    assert empty.any() and not made["mask"][empty].any() and torch.equal(made["documents"], packed[0]["documents"])
    evaluation = data.evaluation_windows(CORPUS, batch=8, context=100, tokenizer=WORDPIECE)
    masked = data.masked(evaluation, WORDPIECE, seed=0, rate=1.0)
    assert len(masked) == len(evaluation) and len(list(masked)) == len(masked)
    for batch, before in zip(masked, evaluation, strict=True):
        assert not batch["mask"][~before["mask"]].any() and batch["mask"].any()
    given = {"tokens": torch.full((2, 4), 9), "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])}
    given["mask"] = torch.zeros(2, 4, dtype=torch.bool)  # of a loss that was: where there is text is said by the other
    found = data.masked([given], WORDPIECE, seed=0, rate=1.0)[0]
    assert torch.equal(found["mask"], given["attention_mask"] == 1) and (given["tokens"] == 9).all()
    found["targets"].zero_()
    assert (given["tokens"] == 9).all()


def test_the_collator_of_transformers_has_the_same_shares(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    WORDPIECE.save(tmp_path / "tokenizer.json")
    names = {key: name for key, name in WORDPIECE.special_names().items() if name}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **names)
    collator = transformers.DataCollatorForLanguageModeling(theirs, seed=0)
    tokens = Drawn(600, 512)[0]["tokens"]
    found = collator([{"input_ids": row} for row in tokens])
    ours = data.masked(Drawn(600, 512), WORDPIECE, seed=0)[0]
    legal = int((~torch.isin(tokens, torch.tensor(WORDPIECE.special.ids))).sum())

    def counts(inputs, chosen):
        return torch.tensor(
            [int(chosen.sum()), int((inputs[chosen] == MASK).sum()), int((inputs[chosen] == tokens[chosen]).sum())]
        )

    chosen = found["labels"] != -100
    assert not torch.isin(tokens[chosen], torch.tensor(WORDPIECE.special.ids)).any()
    off = counts(found["input_ids"], chosen) - counts(ours["tokens"], ours["mask"])
    # a difference of two counts has the variances of both; theirs may draw special tokens as replacements
    assert (off.abs() < 5 * (2 * legal * torch.tensor([0.15, 0.12, 0.016])) ** 0.5).all()


def test_what_is_masked_is_fixed_for_ever():
    batch = data.masked(Drawn(2, 40), WORDPIECE, seed=5)[3]
    assert batch["mask"][0].nonzero().flatten().tolist() == [8, 9, 16, 25, 29, 36]
    assert batch["mask"][1].nonzero().flatten().tolist() == [4, 11, 12, 27, 28]


def test_the_description_tells_what_decides_a_batch():
    windows = data.windows(np.arange(5, 80), batch=2, context=8, seed=0)
    made = [
        data.masked(windows, WORDPIECE, seed=0),
        data.masked(data.windows(np.arange(5, 80), batch=2, context=8, seed=1), WORDPIECE, seed=0),
        *(
            data.masked(windows, WORDPIECE, **{"seed": 0} | change)
            for change in (
                {"seed": 1}, {"rate": 0.2}, {"mask_share": 0.7}, {"random_share": 0.2}, {"whole_words": True},
            )
        ),
    ]  # fmt: skip
    assert len({batches.fingerprint for batches in made}) == len(made)
    assert data.masked(windows, WORDPIECE, seed=0).fingerprint == made[0].fingerprint
    parts = [data.shard(made[0], rank=rank, world=2)[5] for rank in range(2)]
    assert all(torch.equal(torch.cat([part[name] for part in parts]), made[0][5][name]) for name in parts[0])
    assert same(next(data.prefetch(made[0], 5, 6)), made[0][5])


@pytest.mark.parametrize(
    ("tokenizer", "change", "message"),
    [
        (data.Bytes(), {}, "a tokenizer with a mask token, came Bytes without; train one"),
        (WORDPIECE, {"rate": 0.0}, r"a rate in \(0, 1\], came 0.0"),
        (WORDPIECE, {"rate": 1.5}, "came 1.5"),
        (WORDPIECE, {"mask_share": 0.95}, "mask_share=0.95, random_share=0.1"),
        (WORDPIECE, {"random_share": -0.1}, "random_share=-0.1"),
        (WORDPIECE, {"seed": -1}, "expected a seed"),
    ],
)
def test_wrong_arguments_are_errors(tokenizer, change, message):
    with pytest.raises(ValueError, match=message):
        data.masked(Drawn(2, 8), tokenizer, **{"seed": 0} | change)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(2, 3), "batch 0: expected a dict with 'tokens'.* came Tensor; give batches such as those of"),
        ({"x": torch.zeros(2, 3)}, "came dict"),
        ({"tokens": torch.zeros(2, 3)}, r"came \(2, 3\) of torch.float32"),
        ({"tokens": torch.tensor([[0, V]])}, rf"batch 0: expected tokens in \[0, {V}\), came 0 to {V}; give the tok"),
        ({"tokens": torch.tensor([[0, -1]])}, "came -1 to 0"),
    ],
)
def test_wrong_batches_are_errors(batch, message):
    with pytest.raises(ValueError, match=message):
        data.masked([batch], WORDPIECE, seed=0)[0]


@LAW
@given(seed=st.integers(0, 2**64 - 1), t=st.integers(0, 2**50), words=st.booleans(), most=st.integers(1, 20))
def test_at_most_so_many_of_a_row_are_chosen(seed, t, words, most):
    how = {"seed": seed, "rate": 0.3, "whole_words": words}
    windows = data.windows(CORPUS, batch=4, context=20, seed=0, tokenizer=WORDPIECE)
    free, made = data.masked(windows, WORDPIECE, **how)[t], data.masked(windows, WORDPIECE, **how, max_predictions=most)
    batch, tokens = made[t], windows[t]["tokens"]
    places, mask = batch["places"], batch["mask"]
    assert places.shape == mask.shape == batch["targets"].shape == (4, most) and places.dtype == torch.int64
    assert torch.equal(batch["targets"], tokens.take_along_dim(places, 1)) and not places[~mask].any()
    chosen = torch.zeros(4, 20, dtype=torch.long).scatter_add(1, places, mask.long())
    in_order = [row[kept].diff().gt(0).all() for row, kept in zip(places, mask, strict=True)]
    assert chosen.max() <= 1 and all(in_order)
    chosen = chosen.bool()
    assert torch.equal(chosen & free["mask"], chosen)  # some of those that would be chosen, treated as they would be
    assert torch.equal(batch["tokens"], torch.where(chosen, free["tokens"], tokens))
    few = free["mask"].sum(1) <= most
    assert torch.equal(chosen[few], free["mask"][few])
    if not words:
        assert torch.equal(chosen.sum(1), free["mask"].sum(1).clamp(max=most))
    else:  # words are whole
        parts, ids = word_parts(WORDPIECE), tokens.numpy()
        joined = torch.from_numpy(parts.continues[ids[:, 1:]] & parts.open[ids[:, :-1]])
        assert torch.equal(chosen[:, 1:][joined], chosen[:, :-1][joined])
    assert same(batch, made[t]) and made.fingerprint != data.masked(windows, WORDPIECE, **how).fingerprint


def test_which_are_left_out_is_drawn():
    made = data.masked(Drawn(600, 512), WORDPIECE, seed=3, rate=0.3, max_predictions=64)
    batch = made[0]
    assert batch["mask"].all()  # about 140 of each row would be chosen
    counts = torch.bincount(batch["places"].flatten(), minlength=512).double()
    assert ((counts - 75) ** 2 / 75).sum() < 512 + 5 * (2 * 512) ** 0.5  # uniform over the places


def test_predictions_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="masked: expected max_predictions of 1 or more, came 0"):
        data.masked(Drawn(3, 20), WORDPIECE, seed=0, max_predictions=0)
    with pytest.raises(ValueError, match="expected rows of max_predictions=21 tokens or more, came 20"):
        data.masked(Drawn(3, 20), WORDPIECE, seed=0, max_predictions=21)[0]
