"""Laws of batches: pure in (seed, t), shifted by one, every window once per epoch, exact evaluation."""

import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functrain import data
from functrain.data.order import permuted

LAW = settings(deadline=None, derandomize=True, max_examples=60)
SEEDS = st.integers(0, 2**64 - 1)
BATCHES = st.integers(1, 9)
CONTEXTS = st.integers(1, 12)
STEPS = st.integers(0, 200)
MAKERS = st.sampled_from([data.windows, data.crops])


@st.composite
def shapes(draw):
    """(tokens, context) with at least context + 1 tokens."""
    context = draw(CONTEXTS)
    return context + 1 + draw(st.integers(0, 150)), context


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def starts(batches, steps):
    """First token of every window of the first steps, where the tokens are 0, 1, 2, ..."""
    return torch.cat([batches[t]["tokens"][:, 0] for t in range(steps)]).tolist()


def test_the_page_of_the_architecture_works():
    corpus = data.corpus("python")
    batch = data.windows(corpus, batch=16, context=128, seed=0)[0]
    assert {name: (tuple(x.shape), x.dtype) for name, x in batch.items()} == {
        "tokens": ((16, 128), torch.int64),
        "targets": ((16, 128), torch.int64),
        "mask": ((16, 128), torch.bool),
    }
    assert data.Bytes().decode(batch["tokens"][3]).strip("\ufffd") in corpus.text


@LAW
@given(make=MAKERS, shape=shapes(), batch=BATCHES, seed=SEEDS, t=STEPS)
def test_a_batch_is_consecutive_tokens_and_its_targets_the_next_ones(make, shape, batch, seed, t):
    tokens, context = shape
    made = make(np.arange(tokens), batch=batch, context=context, seed=seed)[t]
    first = made["tokens"][:, :1]
    assert torch.equal(made["tokens"], first + torch.arange(context))
    assert torch.equal(made["targets"], first + torch.arange(context) + 1)
    assert torch.equal(made["mask"], torch.ones(batch, context, dtype=torch.bool))
    assert first.min() >= 0 and made["targets"].max() < tokens
    assert all(x.is_contiguous() for x in made.values())
    assert len({x.untyped_storage().data_ptr() for x in made.values()}) == 3


@LAW
@given(make=MAKERS, shape=shapes(), batch=BATCHES, seed=SEEDS, t=STEPS, visits=st.lists(STEPS, max_size=5))
def test_a_batch_is_a_pure_function_of_seed_and_step(make, shape, batch, seed, t, visits):
    tokens, context = shape
    ids = np.arange(tokens)
    batches = make(ids, batch=batch, context=context, seed=seed)
    made = batches[t]
    kept = {name: x.clone() for name, x in made.items()}
    for other in visits:
        batches[other]
    for x in made.values():
        x.zero_()  # a batch is the caller's own: writing to it changes no other
    assert same(batches[t], kept)
    assert same(batches[np.int64(t)], kept)
    assert same(make(ids, batch=np.int32(batch), context=np.int64(context), seed=np.uint64(seed))[t], kept)
    resumed = pickle.loads(pickle.dumps(make(ids.copy(), batch=batch, context=context, seed=seed)))
    assert same(resumed[t], kept)
    assert resumed.fingerprint == batches.fingerprint
    assert np.array_equal(ids, np.arange(tokens))


@LAW
@given(make=MAKERS, seed=SEEDS, t=STEPS)
def test_no_global_generator_is_read_or_advanced(make, seed, t):
    batches = make(np.arange(500), batch=3, context=7, seed=seed)
    made = batches[t]
    for reseed in (0, 1):
        torch.manual_seed(reseed)
        np.random.seed(reseed)
        random.seed(reseed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        assert same(make(np.arange(500), batch=3, context=7, seed=seed)[t], made)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])
        assert random.getstate() == before[2]


@LAW
@given(shape=shapes(), batch=BATCHES, seed=SEEDS)
def test_an_epoch_shows_every_window_once_side_by_side(shape, batch, seed):
    tokens, context = shape
    batches = data.windows(np.arange(tokens), batch=batch, context=context, seed=seed)
    count = batches.order.windows_per_epoch
    assert count == max(1, (tokens - context) // context)
    epochs = 3
    shown = starts(batches, -(-epochs * count // batch))
    for epoch in range(epochs):
        ordered = sorted(shown[epoch * count : (epoch + 1) * count])
        assert ordered == [ordered[0] + context * window for window in range(count)]
        assert ordered[0] >= 0 and ordered[-1] + context < tokens


@LAW
@given(shape=shapes(), batch=BATCHES, seed=SEEDS)
def test_the_row_of_windows_does_not_depend_on_the_batch_size(shape, batch, seed):
    tokens, context = shape
    one = data.windows(np.arange(tokens), batch=1, context=context, seed=seed)
    several = data.windows(np.arange(tokens), batch=batch, context=context, seed=seed)
    assert starts(several, 5) == starts(one, 5 * batch)


def test_epochs_differ_in_order_and_phase_and_together_target_every_token_but_the_first():
    batches = data.windows(np.arange(43), batch=6, context=6, seed=0)
    assert batches.order.windows_per_epoch == 6
    epochs = [starts([batches[t]], 1) for t in range(300)]
    phases = [min(epoch) for epoch in epochs]
    orders = [tuple((start - min(epoch)) // 6 for start in epoch) for epoch in epochs]
    assert set(phases) == set(range(7))  # 43 tokens have 42 targets, 36 of them in an epoch: phases 0 to 6
    assert len(set(orders)) > 150  # of 720
    assert {start + 1 + i for epoch in epochs for start in epoch for i in range(6)} == set(range(1, 43))


@LAW
@given(count=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 2**40))
def test_permuted_is_a_permutation_of_any_count(count, seed, epoch):
    indices = np.arange(count)
    assert np.array_equal(np.sort(permuted(indices, count, seed, epoch)), np.arange(count))
    assert np.array_equal(indices, np.arange(count))
    assert permuted(indices[-1:], count, seed, epoch)[0] == permuted(indices, count, seed, epoch)[-1]


def test_permuted_sends_neighbours_anywhere():
    n, epochs = 10_000, 20
    rows = np.stack([permuted(np.arange(n), n, 0, epoch) for epoch in range(epochs)])
    for lag in (1, 100):  # 100: one row of the rectangle
        correlation = np.mean([np.corrcoef(row[:-lag], row[lag:])[0, 1] for row in rows])
        assert abs(correlation) < 4 / np.sqrt(n * epochs)  # four standard deviations of a random order's
    fixed = (rows == np.arange(n)).sum()
    assert abs(fixed - epochs) < 4 * np.sqrt(epochs)  # Poisson with mean 1 in each epoch


@LAW
@given(count=st.integers(2, 5000), batch=BATCHES, seed=SEEDS, t=STEPS)
def test_crops_begin_everywhere_a_window_fits(count, batch, seed, t):
    batches = data.crops(np.arange(count + 4), batch=batch, context=4, seed=seed)
    assert all(0 <= start < count for start in starts([batches[t]], 1))


def test_crops_are_uniform():
    batches = data.crops(np.arange(14), batch=500, context=4, seed=0)
    counts = np.bincount(starts(batches, 20), minlength=10)
    assert len(counts) == 10  # randint(14 - 4), as in nanoGPT's get_batch
    # chi square with 9 degrees of freedom: 33.7 is exceeded once in 10,000
    assert ((counts - 1000) ** 2 / 1000).sum() < 33.7


def test_the_orders_are_fixed_for_ever():
    # a resumed run on another machine or another numpy must draw the same windows
    ids = np.arange(1000)
    assert starts([data.windows(ids, batch=6, context=8, seed=1)[7]], 1) == [983, 783, 351, 31, 311, 951]
    assert starts([data.crops(ids, batch=6, context=8, seed=1)[7]], 1) == [179, 626, 539, 378, 475, 506]


@LAW
@given(tokens=st.integers(2, 200), context=CONTEXTS, batch=BATCHES)
def test_evaluation_targets_every_token_but_the_first_once_in_order(tokens, context, batch):
    batches = data.evaluation_windows(np.arange(1, tokens + 1), batch=batch, context=context)
    targets = torch.cat([made["targets"][made["mask"]] for made in batches])
    assert torch.equal(targets, torch.arange(2, tokens + 1))
    assert torch.equal(torch.cat([made["tokens"][made["mask"]] for made in batches]), torch.arange(1, tokens))
    assert len(list(batches)) == len(batches) == -(-(tokens - 1) // (batch * context))
    for made in batches:
        assert all(x.shape == (batch, context) for x in made.values())
        assert made["tokens"].dtype == made["targets"].dtype == torch.int64 and made["mask"].dtype == torch.bool
        assert not made["targets"][~made["mask"]].any()
    for outside in (-1, len(batches)):
        with pytest.raises(IndexError, match="expected a batch in"):
            batches[outside]


def test_sources_of_every_kind_give_the_same_batches(tmp_path):
    corpus = data.corpus("python", split="validation")
    tokens = data.tokenize(corpus)
    mapped = data.tokenize(corpus, folder=tmp_path)
    arguments = {"batch": 3, "context": 50, "seed": 2}
    made = data.windows(corpus, **arguments)
    assert same(made[5], data.windows(tokens, **arguments)[5])
    assert same(made[5], data.windows(mapped, **arguments)[5])
    assert same(made[5], data.windows(torch.from_numpy(tokens.ids.astype(np.int64)), **arguments)[5])
    assert same(made[5], data.windows(corpus, **arguments, tokenizer=data.Bytes())[5])
    assert made.fingerprint == data.windows(mapped, **arguments).fingerprint
    characters = data.Characters(corpus.text)
    assert not same(made[5], data.windows(corpus, **arguments, tokenizer=characters)[5])


def test_the_fingerprint_changes_with_everything_that_changes_a_batch():
    ids = np.arange(100)
    arguments = {"batch": 3, "context": 5, "seed": 2}
    changed = ids.copy()
    changed[50] = 7
    made = [
        data.windows(ids, **arguments),
        data.crops(ids, **arguments),
        data.windows(changed, **arguments),
        data.windows(ids[:-1], **arguments),
        *(data.windows(ids, **arguments | change) for change in ({"batch": 4}, {"context": 6}, {"seed": 3})),
    ]
    assert len({batches.fingerprint for batches in made}) == len(made)
    assert made[0].fingerprint == data.windows(ids.copy(), **arguments).fingerprint
    assert made[0].description["order"] == "epochs"
    assert made[0].description["batch"] == 3


def test_a_pickle_holds_the_tokens_and_not_every_window():
    batches = data.windows(np.zeros(10_000, np.uint8), batch=3, context=500, seed=0)
    assert len(pickle.dumps(batches)) < 12_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 10}, "context 10 needs 11 tokens, came 10"),
        ({"batch": 0}, "batch=0"),
        ({"context": 0}, "context=0"),
        ({"seed": -1}, "came -1"),
        ({"seed": 2**64}, "expected a seed"),
        ({"tokenizer": data.Bytes()}, "these are tokens already"),
        ({"source": np.zeros((2, 9), int)}, r"one row of integers, came \(2, 9\)"),
        ({"source": np.zeros(10)}, "of float64"),
        ({"source": [1, 2, 3]}, "list"),
    ],
)
def test_wrong_arguments_are_errors(change, message):
    arguments = {"source": np.arange(10), "batch": 2, "context": 4, "seed": 0} | change
    for make in (data.windows, data.crops):
        with pytest.raises(ValueError, match=message):
            make(arguments["source"], **{name: value for name, value in arguments.items() if name != "source"})


def test_steps_begin_at_zero():
    batches = data.windows(np.arange(10), batch=2, context=4, seed=0)
    with pytest.raises(IndexError, match="came -1"):
        batches[-1]
    with pytest.raises(TypeError):
        batches[0.5]
    with pytest.raises(ValueError, match="needs 2 tokens, came 1"):
        data.evaluation_windows(np.arange(1), batch=1, context=4)
