"""Time batches of rows beside a torch DataLoader without workers, over the same data in memory, shuffled.

`python benchmarks/batches.py` prints a table: medians of 25 interleaved rounds of 50 batches each, in CPU time,
so that what else runs on the machine counts little: without workers everything happens in this one thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from functrain import data

ROUNDS, BATCHES = 25, 50
CASES = {
    "images 3x32x32 float32, batch 128": ((3, 32, 32), torch.float32, 128),
    "images 3x32x32 uint8, batch 128": ((3, 32, 32), torch.uint8, 128),
    "20 features float32, batch 128": ((20,), torch.float32, 128),
    "20 features float32, batch 32": ((20,), torch.float32, 32),
}


class Rows(Dataset[Any]):
    """A map-style dataset of one's own, whose rows only it can give."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, i: int) -> Any:
        return tuple(tensor[i] for tensor in self.tensors)


def taken(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def numbered(batches: Any) -> Iterator[Any]:
    t = 0
    while True:
        yield batches[t]
        t += 1


def microseconds(next_batches: dict[str, Iterator[Any]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in next_batches}
    for _ in range(ROUNDS + 1):
        for name, batches in next_batches.items():
            start = time.thread_time()
            for _ in islice(batches, BATCHES):
                pass
            found[name].append((time.thread_time() - start) / BATCHES * 1e6)
    return {name: times[1:] for name, times in found.items()}


def contenders(tensors: tuple[torch.Tensor, ...], batch: int) -> dict[str, Iterator[Any]]:
    dataset, rows = TensorDataset(*tensors), Rows(*tensors)
    options: dict[str, Any] = {"batch_size": batch, "shuffle": True, "drop_last": True}
    make: Callable[[Any], Iterator[Any]] = lambda source: numbered(data.batches(source, batch=batch, seed=0))  # noqa: E731
    return {
        "DataLoader(TensorDataset)": taken(DataLoader(dataset, **options)),
        "ft.data.batches of the tensors": make(tensors),
        "ft.data.batches of the TensorDataset": make(dataset),
        "DataLoader(Dataset of one's own)": taken(DataLoader(rows, **options)),
        "ft.data.batches of that Dataset": make(rows),
        "ft.data.loader(DataLoader(TensorDataset))": numbered(data.loader(DataLoader(dataset, **options), seed=0)),
    }


def main() -> None:
    torch.set_num_threads(1)
    for title, (shape, dtype, batch) in CASES.items():
        features = torch.randint(0, 255, (20_000, *shape)).to(dtype)
        times = microseconds(contenders((features, torch.arange(20_000) % 10), batch))
        medians = {name: statistics.median(found) for name, found in times.items()}
        first = next(iter(medians.values()))
        print(f"\n{title}, 20,000 rows\n\n| batches | CPU us each, median | spread | speed |\n|---|---|---|---|")
        for name, found in times.items():
            print(f"| {name} | {medians[name]:.1f} | {min(found):.1f}-{max(found):.1f} | {first / medians[name]:.2f} |")


if __name__ == "__main__":
    main()
