"""Laws of the loader: a DataLoader epoch after epoch, that goes on where a run was or says that nobody knows where."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import data as torch_data

import functrain as ft
from functrain import data

SIZE, BATCH, PER_EPOCH = 10, 3, 4
Pair = namedtuple("Pair", ["x", "y"])


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(**options: Any) -> torch_data.DataLoader[Any]:
    return torch_data.DataLoader(torch_data.TensorDataset(torch.arange(SIZE)), batch_size=BATCH, **options)


def distributed(rank: int = 0) -> torch_data.DataLoader[Any]:
    dataset = torch_data.TensorDataset(torch.arange(24))
    sampler = torch_data.DistributedSampler(dataset, num_replicas=2, rank=rank, seed=3)
    return torch_data.DataLoader(dataset, batch_size=BATCH, sampler=sampler)


class Stream(torch_data.IterableDataset[Any]):
    def __init__(self, sizes: Any = (3, 3, 3, 3)) -> None:
        self.sizes, self.begun = sizes, 0

    def __iter__(self) -> Any:
        self.begun += 1
        return iter(torch.arange(self.sizes[self.begun - 1]))


class Sized:
    """Iterated anew, in an order that nobody knows, and with a len that may be wrong."""

    def __init__(self, said: int, given: int) -> None:
        self.said, self.given = said, given

    def __len__(self) -> int:
        return self.said

    def __iter__(self) -> Any:
        return iter(range(self.given))


def seen(batches: Any, steps: range) -> list[list[int]]:
    return [batches[t][0].tolist() for t in steps]


KNOWN: dict[str, Any] = {
    "in order": lambda: data.loader(rows()),
    "dropping the last": lambda: data.loader(rows(drop_last=True)),
    "generator": lambda: data.loader(rows(shuffle=True, generator=generator())),
    "seed": lambda: data.loader(rows(shuffle=True), seed=7),
    "sampler with a generator": lambda: data.loader(
        rows(sampler=torch_data.WeightedRandomSampler([1.0] * SIZE, SIZE, generator=generator()))
    ),
    "set_epoch": lambda: data.loader(distributed()),
    "list": lambda: data.loader([(torch.tensor([i]),) for i in range(5)]),
    "batches": lambda: data.loader(data.batches((np.arange(SIZE),), batch=3, shuffle=False)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_where_the_order_is_known_any_batch_can_be_had_by_its_number(name: str) -> None:
    make = KNOWN[name]
    whole = seen(make(), range(12))
    for start in (0, 1, 3, 4, 5, 9):
        assert seen(make(), range(start, 12)) == whole[start:]
    back = make()
    assert seen(back, range(7, 10)) + seen(back, range(2, 5)) == whole[7:10] + whole[2:5]
    assert [b[0].tolist() for b in data.prefetch(make(), 2, 9, depth=3, workers=2)] == whole[2:9]
    torch.manual_seed(99)  # no matter: no global generator decides
    assert seen(make(), range(12)) == whole


@pytest.mark.parametrize("make", [lambda: rows(shuffle=True, generator=generator()), distributed, rows])
def test_the_first_epoch_is_that_of_the_dataloader_itself(make: Any) -> None:
    assert seen(data.loader(make()), range(len(make()))) == [b[0].tolist() for b in make()]


def test_epochs_are_shuffled_each_anew_by_seed_and_epoch() -> None:
    loader = data.loader(rows(shuffle=True), seed=7)
    epochs = [sum(seen(loader, range(e * PER_EPOCH, (e + 1) * PER_EPOCH)), []) for e in range(3)]
    assert all(sorted(epoch) == list(range(SIZE)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    expected = [b[0].tolist() for b in rows(shuffle=True, generator=generator(7 + 1))]
    assert sum(expected, []) == epochs[1]
    ranks = [sum(seen(data.loader(distributed(rank)), range(4, 8)), []) for rank in (0, 1)]
    assert sorted(ranks[0] + ranks[1]) == list(range(24))
    plain = distributed()
    plain.sampler.set_epoch(1)  # type: ignore[attr-defined]
    assert sum((b[0].tolist() for b in plain), []) == ranks[0]


def test_the_callers_generator_is_not_touched_and_a_second_loader_begins_with_the_first_seed() -> None:
    own = generator()
    before = own.get_state()
    dataloader = rows(shuffle=True, generator=own)
    first = seen(data.loader(dataloader), range(6))
    assert torch.equal(own.get_state(), before)
    assert seen(data.loader(dataloader), range(6)) == first


def test_workers_draw_the_same_for_their_datasets_again() -> None:
    def make() -> Any:
        dataset = Noisy()
        return data.loader(torch_data.DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=1), seed=5)

    whole = [make_t.tolist() for make_t in map(make().__getitem__, range(6))]
    assert make()[5].tolist() == whole[5] != whole[4]


class Noisy(torch_data.Dataset[Any]):
    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, i: int) -> Any:
        return i + torch.rand(())


@pytest.mark.parametrize(
    "make",
    [
        lambda: rows(shuffle=True),
        lambda: rows(sampler=torch_data.RandomSampler(range(SIZE))),
        lambda: Sized(4, 4),
        lambda: torch_data.DataLoader(Stream()),
        Stream,
    ],
)
def test_of_an_order_that_is_not_known_only_beginnings_can_be_had(make: Any) -> None:
    loader = data.loader(make())
    for t in range(6):
        loader[t]
    with pytest.raises(ValueError, match="loader: batch 2 was asked for, .* write ft.data.loader.dataloader, seed=0."):
        loader[2]
    fresh = data.loader(make())
    if fresh.steps_per_epoch is not None:
        fresh[4]
        assert fresh.steps_per_epoch == 4.0
    else:
        with pytest.raises(ValueError, match="batch 4 was asked for"):
            fresh[4]
    loader[0]  # a beginning


def test_a_run_that_is_resumed_reads_on_and_a_rows_order_is_that_of_the_whole() -> None:
    read: list[list[int]] = []

    def step(state: Any, batch: Any) -> Any:
        read.append(batch[0].tolist())
        return state._replace(step=state.step + 1), {}

    state = ft.init_state({"w": torch.zeros(1)}, ft.optim.sgd(0.1), key=ft.random.key(0))
    loader = data.loader(rows(shuffle=True), seed=1)
    half = ft.fit(step, state, loader, steps=6)
    ft.fit(step, half, loader, steps=9)  # in the same process
    ft.fit(step, half, data.loader(rows(shuffle=True), seed=1), steps=9)  # in another one
    whole = seen(data.loader(rows(shuffle=True), seed=1), range(9))
    assert read == whole + whole[6:]
    unknown = data.loader(rows(shuffle=True))
    half = ft.fit(step, state, unknown, steps=6)
    ft.fit(step, half, unknown, steps=7)  # it stands there
    with pytest.raises(ValueError, match="loader: batch 6 was asked for"):
        ft.fit(step, half, data.loader(rows(shuffle=True)), steps=7)


def test_batches_keep_their_structure_and_arrays_become_tensors() -> None:
    readonly = np.frombuffer(b"\1\2", np.uint8)
    for batch in (
        (np.arange(2), [np.ones(2, np.float32)]),
        Pair(np.arange(2), {"b": readonly}),
        {"x": torch.ones(2), "names": ["a", "b"], "word": np.array(["a"])},
    ):
        made = data.loader([batch])[1]
        assert ft.tree.structure(made) == ft.tree.structure(batch)
        for x, y in zip(ft.tree.leaves(made), ft.tree.leaves(batch), strict=True):
            assert isinstance(x, torch.Tensor) if isinstance(y, np.ndarray) and y.dtype.kind != "U" else x is y
    (moved,) = data.prefetch(data.loader([{"x": torch.ones(2), "name": "a"}]), 0, 1, device="meta")
    assert moved["x"].device.type == "meta" and moved["name"] == "a"


def test_an_epoch_of_another_length_than_was_said_or_of_none_is_told() -> None:
    for said, given in ((3, 2), (2, 3)):
        loader = data.loader(Sized(said, given))
        with pytest.raises(ValueError, match=f"expected {said} batches, as its len says.*came {given} in epoch 0"):
            for t in range(5):
                loader[t]
    for empty in (Sized(0, 0), []):
        with pytest.raises(ValueError, match="at least one batch in each epoch, came 0 in epoch 0"):
            data.loader(empty)[0]  # type: ignore[arg-type]
    loader = data.loader(Stream((3, 0)))
    with pytest.raises(ValueError, match="at least one batch .* came 0 in epoch 1"):
        for t in range(4):
            loader[t]


def test_epochs_of_a_stream_may_differ_in_length() -> None:
    loader = data.loader(Stream((2, 3, 1)))
    assert [int(loader[t]) for t in range(6)] == [0, 1, 0, 1, 2, 0] and loader.steps_per_epoch is None


def test_after_an_error_of_the_dataset_the_batch_can_be_asked_for_again() -> None:
    class Failing(torch_data.Dataset[Any]):
        broken = True

        def __len__(self) -> int:
            return 6

        def __getitem__(self, i: int) -> int:
            if i == 3 and self.broken:
                self.broken = False
                raise OSError("no such file")
            return i

    loader = data.loader(torch_data.DataLoader(Failing(), batch_size=2))
    assert loader[0].tolist() == [0, 1]
    with pytest.raises(OSError, match="no such file"):
        loader[1]
    assert loader[1].tolist() == [2, 3] and loader[2].tolist() == [4, 5]


def test_the_fingerprint_changes_with_dataset_batch_and_seed() -> None:
    made = [
        data.loader(rows()),
        data.loader(rows(shuffle=True)),
        data.loader(rows(shuffle=True), seed=0),
        data.loader(rows(shuffle=True), seed=1),
        data.loader(rows(drop_last=True)),
        data.loader(distributed()),
    ]
    assert len({loader.fingerprint for loader in made}) == len(made)
    made[2][5]
    assert made[2].fingerprint == data.loader(rows(shuffle=True), seed=0).fingerprint
    assert made[2].description["seeds"] == [0]


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: data.loader(iter([1])), TypeError, "came list_iterator; give ft.fit an iterator as it is"),
        (lambda: data.loader(Noisy()), TypeError, "came Noisy; .*ft.data.batches the rows of a dataset"),  # type: ignore[arg-type]
        (lambda: data.loader({"x": torch.ones(2)}), TypeError, "came dict"),
        (lambda: data.loader(torch.ones(2)), TypeError, "came Tensor"),
        (lambda: data.loader(data.batches(torch.ones(2), batch=1, seed=0)), TypeError, "came Batches"),
        (lambda: data.loader(rows(), seed=0), ValueError, "nothing is drawn from seed=0 by this DataLoader"),
        (lambda: data.loader(distributed(), seed=0), ValueError, "nothing is drawn from seed=0"),
        (lambda: data.loader([1], seed=0), ValueError, "nothing is drawn from seed=0 by this list"),
        (lambda: data.loader(rows(shuffle=True, generator=generator()), seed=0), ValueError, "has a generator already"),
        (lambda: data.loader(rows(shuffle=True), seed=-1), ValueError, "expected a seed in"),
    ],
)
def test_what_cannot_be_loaded_is_told(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=f"loader: .*{says}"):
        make()
    with pytest.raises(IndexError, match="a step t of 0 or more, came -1"):
        data.loader(rows())[-1]
