"""Laws of batches of rows: pure in (seed, t), each row once per epoch, one order for any ranks and workers."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import functrain as ft
from functrain import data

LAW = settings(deadline=None, derandomize=True, max_examples=60)
SEEDS = st.integers(0, 2**64 - 1)
ROWS = st.integers(1, 60)
SIZES = st.integers(1, 9)
STEPS = st.integers(0, 200)
LASTS = st.sampled_from(["continued", "short", "filled", "dropped"])
FIXED = settings(LAW, max_examples=25)


def table(rows: int) -> dict[str, Any]:
    return {"row": np.arange(rows), "x": {"square": torch.arange(rows, dtype=torch.float32)[:, None] ** 2}}


def shown(batches: Any, steps: range) -> list[list[int]]:
    """The rows of each batch that count."""
    return [b["row"][b["mask"]].tolist() if "mask" in b else b["row"].tolist() for b in (batches[t] for t in steps)]


def same(a: Any, b: Any) -> bool:
    return ft.tree.structure(a) == ft.tree.structure(b) and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(ft.tree.leaves(a), ft.tree.leaves(b), strict=True)
    )


@LAW
@given(rows=ROWS, batch=SIZES, seed=SEEDS, last=LASTS, t=STEPS, visits=st.lists(STEPS, max_size=4))
def test_a_batch_is_a_pure_function_of_seed_and_step_in_its_own_memory(
    rows: int, batch: int, seed: int, last: Any, t: int, visits: list[int]
) -> None:
    batch = min(batch, rows)
    source = table(rows)
    batches = data.batches(source, batch=batch, seed=seed, last=last)
    made = batches[t]
    kept = ft.tree.map(torch.clone, made)
    for other in visits:
        batches[other]
    for leaf in ft.tree.leaves(made):
        leaf.zero_()
    assert same(batches[t], kept) and same(batches[np.int64(t)], kept)
    assert np.array_equal(source["row"], np.arange(rows))
    assert torch.equal(source["x"]["square"], table(rows)["x"]["square"])
    again = pickle.loads(pickle.dumps(data.batches(table(rows), batch=batch, seed=seed, last=last)))
    assert same(again[t], kept) and again.fingerprint == batches.fingerprint
    assert torch.equal(kept["x"]["square"][:, 0], kept["row"].float() ** 2)  # the leaves of a row stay together


@LAW
@given(rows=ROWS, batch=SIZES, seed=SEEDS, last=LASTS)
def test_an_epoch_shows_each_row_once_in_an_order_of_its_own(rows: int, batch: int, seed: int, last: Any) -> None:
    batch = min(batch, rows)
    batches = data.batches(table(rows), batch=batch, seed=seed, last=last)
    if last == "continued":
        seen = sum(shown(batches, range(3 * rows)), [])
        epochs = [seen[start : start + rows] for start in range(0, 3 * rows, rows)]
    else:
        size = rows // batch if last == "dropped" else -(-rows // batch)
        epochs = [sum(shown(batches, range(e * size, (e + 1) * size)), []) for e in range(3)]
    whole = rows - rows % batch if last == "dropped" else rows
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == whole and set(epoch) <= set(range(rows))
    if whole > 12:
        assert epochs[0] != epochs[1] != epochs[2]  # by chance equal once in 12!


@LAW
@given(rows=ROWS, batch=SIZES, epochs=st.integers(1, 3), last=LASTS, shuffle=st.booleans())
def test_finite_batches_have_a_length_an_end_and_the_shapes_of_last(
    rows: int, batch: int, epochs: int, last: Any, shuffle: bool
) -> None:
    if last == "dropped":
        batch = min(batch, rows)
    seed = 3 if shuffle else None
    batches: Any = data.batches(table(rows), batch=batch, seed=seed, shuffle=shuffle, epochs=epochs, last=last)
    made = list(batches)
    assert len(made) == len(batches)
    with pytest.raises(IndexError, match=rf"a batch in \[0, {len(made)}\), came {len(made)}"):
        batches[len(made)]
    sizes = [len(b["row"]) for b in made]
    seen = sum(shown(batches, range(len(batches))), [])
    if last == "continued":
        assert sizes[:-1] == [batch] * (len(made) - 1) and sum(sizes) == epochs * rows
    elif last == "short":
        assert sizes == ([batch] * (rows // batch) + [rows % batch] * (rows % batch > 0)) * epochs
    else:
        assert set(sizes) == {batch}
    if last == "filled":
        for b in made:
            count = int(b["mask"].sum())
            assert b["mask"].dtype == torch.bool and b["mask"].tolist() == [True] * count + [False] * (batch - count)
            assert set(b["row"][count:].tolist()) <= {int(b["row"][count - 1])}
    if not shuffle:
        whole = rows - rows % batch if last == "dropped" else rows
        assert seen == list(range(whole)) * epochs


@LAW
@given(rows=ROWS, batch=SIZES, seed=SEEDS)
def test_the_order_of_rows_does_not_depend_on_the_batch_size(rows: int, batch: int, seed: int) -> None:
    one = data.batches(table(rows), batch=1, seed=seed)
    several = data.batches(table(rows), batch=batch, seed=seed)
    assert sum(shown(several, range(5)), []) == sum(shown(one, range(5 * batch)), [])


@FIXED
@given(rows=ROWS, batch=st.integers(4, 9), seed=SEEDS, start=STEPS, last=st.sampled_from(["continued", "filled"]))
def test_ranks_workers_and_a_start_in_the_middle_give_one_order(
    rows: int, batch: int, seed: int, start: int, last: Any
) -> None:
    batches = data.batches(table(rows), batch=batch, seed=seed, last=last)
    expected = [batches[t] for t in range(start, start + 4)]
    for world in (1, 2, 4):
        shards = [data.shard(batches, rank=rank, world=world) for rank in range(world)]
        for t, whole in enumerate(expected, start):
            parts = [shard[t] for shard in shards]
            assert same(ft.tree.map(lambda *leaves: torch.cat(leaves), *parts), whole)
    for depth, workers in ((1, 1), (3, 2)):
        made = list(data.prefetch(batches, start, start + 4, depth=depth, workers=workers))
        assert all(same(a, b) for a, b in zip(made, expected, strict=True))


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped() -> None:
    tx = ft.optim.adam(1e-2)
    source = (torch.arange(26.0).reshape(13, 2) / 26, torch.arange(13.0)[:, None] / 13)
    crop = lambda batch, key: (batch[0] + 0.1 * ft.random.normal(key, batch[0].shape), batch[1])  # noqa: E731
    step = ft.train_step(lambda params, b, key: torch.mean((b[0] @ params["w"] - b[1]) ** 2), tx)
    state = ft.init_state({"w": torch.zeros(2, 1)}, tx, key=ft.random.key(0))
    for last in ("continued", "short"):
        batches = data.batches(source, batch=4, seed=1, last=last, transform=crop)
        whole = ft.fit(step, state, batches, steps=9)
        fresh = data.batches(source, batch=4, seed=1, last=last, transform=crop)
        half = ft.fit(step, state, batches, steps=5)
        assert same(ft.fit(step, half, fresh, steps=9).params, whole.params)


@LAW
@given(rows=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 1000))
def test_an_order_that_is_kept_is_the_one_that_is_drawn(rows: int, seed: int, epoch: int) -> None:
    drawn = data.order.permuted(np.arange(rows), rows, seed, epoch)
    order = data.order.Rows(rows, rows, seed, "short", None)
    made = order.indices(epoch)
    assert np.array_equal(made, drawn)
    made[:] = 0  # the caller's own
    assert np.array_equal(order.indices(epoch), drawn)


def test_orders_are_fixed_for_ever() -> None:
    # a resumed run on another machine or another numpy must see the same rows
    assert shown(data.batches(table(1000), batch=6, seed=1), range(7, 8)) == [[413, 751, 518, 11, 40, 6]]
    assert shown(data.batches({"row": np.arange(2**18)}, batch=6, seed=1), range(7, 8)) == [
        [113098, 214626, 89006, 209325, 147423, 59388]
    ]


def test_no_global_generator_is_read_or_advanced() -> None:
    noise = lambda batch, key: batch | {"noise": ft.random.normal(key, (3,))}  # noqa: E731
    made = data.batches(table(20), batch=3, seed=5, transform=noise)[4]
    for reseed in (0, 1):
        torch.manual_seed(reseed)
        np.random.seed(reseed)
        random.seed(reseed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[union-attr, index]
        assert same(data.batches(table(20), batch=3, seed=5, transform=noise)[4], made)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])  # type: ignore[index]
        assert random.getstate() == before[2]


def test_a_transform_gets_the_batch_with_its_mask_and_a_key_of_seed_and_step() -> None:
    seen: list[Any] = []

    def transform(batch: Any, key: Any) -> Any:
        seen.append(key)
        return {"both": batch["row"] * batch["mask"]}

    batches: Any = data.batches(table(5), batch=3, seed=0, shuffle=False, last="filled", transform=transform)
    assert [b["both"].tolist() for b in batches] == [[0, 1, 2], [3, 4, 0]]
    batches[0]
    other = data.batches(table(5), batch=3, seed=1, last="filled", transform=transform)
    other[0]
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[3])
    # a run with the same seed draws its dropout of step t from other numbers
    assert not torch.equal(seen[0], ft.random.fold_in(ft.random.key(0), 0))


def test_a_transform_of_each_row_is_mapped() -> None:
    def row(x: Any, key: Any) -> Any:
        return x + ft.random.uniform(key, x.shape)

    def transform(batch: Any, key: Any) -> Any:
        return ft.vmap(row)(batch, ft.random.split(key, len(batch)))

    made = data.batches(torch.zeros(6, 2), batch=4, seed=0, transform=transform)[0]
    assert made.shape == (4, 2) and len(set(made.flatten().tolist())) == 8


def test_the_fingerprint_changes_with_what_changes_a_batch_and_with_nothing_else() -> None:
    arguments: dict[str, Any] = {"batch": 3, "seed": 2}
    changed = table(9)
    changed["x"]["square"][4] += 1
    renamed = {"rows": table(9)["row"], "x": table(9)["x"]}
    made = [
        data.batches(table(9), **arguments),
        data.batches(changed, **arguments),
        data.batches(renamed, **arguments),
        data.batches(table(8), **arguments),
        data.batches(table(9), batch=3, shuffle=False),
        data.batches(table(9), transform=lambda batch, key: batch, **arguments),
        *(data.batches(table(9), **arguments | change) for change in ({"batch": 4}, {"seed": 3}, {"last": "short"})),
    ]
    assert len({batches.fingerprint for batches in made}) == len(made)
    for equal in (
        data.batches({"x": table(9)["x"], "row": torch.arange(9)}, **arguments),
        data.batches(table(9), epochs=5, **arguments),
    ):
        assert equal.fingerprint == made[0].fingerprint
    made[0][7]
    assert made[0].fingerprint == data.batches(table(9), **arguments).fingerprint
    wide = np.zeros((9, 2**21), np.uint8)  # read in pieces
    other = wide.copy()
    other[8, -1] = 1
    assert data.batches(wide, **arguments).fingerprint != data.batches(other, **arguments).fingerprint


def test_the_steps_of_an_epoch_are_told() -> None:
    assert data.batches(table(10), batch=4, seed=0).steps_per_epoch == 2.5
    assert data.batches(table(10), batch=4, seed=0, last="short").steps_per_epoch == 3.0
    assert data.batches(table(10), batch=4, seed=0, last="dropped").steps_per_epoch == 2.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch": 0}, "batch=0 of 5 rows"),
        ({"source": {"x": np.zeros((0, 2))}}, "batch=2 of 0 rows"),
        ({"seed": None}, "expected a seed to shuffle by; write seed=0"),
        ({"shuffle": False}, "nothing is drawn from seed=0"),
        ({"seed": -1}, "came -1"),
        ({"seed": 2**64}, "expected a seed in"),
        ({"epochs": 0}, "epochs of 1 or more, came 0"),
        ({"last": "drop"}, "one of continued, short, filled, dropped, came 'drop'"),
        ({"batch": 6, "last": "dropped"}, "leaves none of 5 rows in batches of 6"),
        ({"source": {"mask": torch.zeros(5)}, "last": "filled"}, "came a dict with a 'mask'"),
        ({"source": torch.zeros(5), "last": "filled"}, "behind a tuple, came a Tensor"),
    ],
)
def test_wrong_arguments_are_errors(change: dict[str, Any], says: str) -> None:
    arguments: dict[str, Any] = {"source": table(5), "batch": 2, "seed": 0} | change
    with pytest.raises(ValueError, match=says):
        data.batches(arguments.pop("source"), **arguments)


def test_steps_begin_at_zero() -> None:
    batches = data.batches(table(5), batch=2, seed=0)
    with pytest.raises(IndexError, match="a step t of 0 or more, came -1"):
        batches[-1]
    with pytest.raises(TypeError):
        batches[0.5]  # type: ignore[index]
    assert not hasattr(batches, "__len__")


def test_a_filled_tuple_has_its_mask_behind_it() -> None:
    (made,) = data.batches((torch.arange(2), torch.arange(2)), batch=3, shuffle=False, last="filled")
    assert len(made) == 3 and made[2].tolist() == [True, True, False]
