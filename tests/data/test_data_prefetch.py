"""Laws of prefetch: the same batches in the same order, errors in their place, no thread left behind."""

import gc
import itertools
import threading
import time
import traceback

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functrain import data

LAW = settings(deadline=None, derandomize=True, max_examples=40)


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("functrain-prefetch")]


class Slow:
    """Batch t is t, after a wait that makes later batches overtake earlier ones."""

    def __init__(self, fail_at=None):
        self.fail_at, self.made = fail_at, []

    def __getitem__(self, t):
        time.sleep(0.002 * (t % 3 == 0))
        if t == self.fail_at:
            raise_on_purpose(t)
        self.made.append(t)
        return t


def raise_on_purpose(t):
    raise RuntimeError(f"batch {t}")


@LAW
@given(start=st.integers(0, 20), length=st.integers(0, 12), depth=st.integers(1, 6), workers=st.integers(1, 4))
def test_it_equals_the_plain_loop_for_any_depth_and_workers(start, length, depth, workers):
    expected = list(range(start, start + length))
    assert list(data.prefetch(Slow(), start, start + length, depth=depth, workers=workers)) == expected
    assert not threads()


@pytest.mark.parametrize("workers", [1, 3])
def test_windows_are_the_same_from_any_number_of_workers(workers):
    batches = data.windows(np.arange(1000), batch=3, context=7, seed=0)
    for t, made in zip(range(5, 60), data.prefetch(batches, 5, 60, workers=workers), strict=True):
        assert all(torch.equal(made[name], x) for name, x in batches[t].items())


def test_nothing_is_made_before_the_first_is_asked_for_nor_more_than_depth_ahead():
    batches = Slow()
    iterator = data.prefetch(batches, 0, 100, depth=3)
    assert not threads() and batches.made == []
    assert [next(iterator), next(iterator)] == [0, 1]
    deadline = time.monotonic() + 10.0
    while len(batches.made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert batches.made == [0, 1, 2, 3, 4]  # 2, 3 and 4 wait
    iterator.close()


def test_an_error_comes_in_its_place_with_the_traceback_of_the_thread():
    iterator = data.prefetch(Slow(fail_at=3), 0, 10)
    assert list(itertools.islice(iterator, 3)) == [0, 1, 2]
    with pytest.raises(RuntimeError, match="batch 3") as caught:
        next(iterator)
    assert "raise_on_purpose" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert not threads()
    assert list(iterator) == []


def test_closing_early_or_dropping_ends_the_threads():
    iterator = data.prefetch(Slow(), 0, 10**9, workers=2)
    assert next(iterator) == 0 and threads()
    iterator.close()
    assert not threads()
    for t in data.prefetch(Slow(), 0, 10**9):
        if t == 3:
            break
    gc.collect()
    assert not threads()


def test_an_error_of_the_consumer_ends_the_threads():
    iterator = data.prefetch(Slow(), 0, 10**9)
    with pytest.raises(ZeroDivisionError):
        for t in iterator:
            1 // (t - 2)
    iterator.close()
    assert not threads()


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        "meta",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
    ],
)
def test_a_device_moves_every_leaf(device):
    batches = data.windows(np.arange(1000), batch=3, context=7, seed=0)
    (made,) = data.prefetch(batches, 4, 5, device=device)
    assert made.keys() == batches[4].keys()
    for name, x in batches[4].items():
        assert made[name].device.type == device and made[name].shape == x.shape and made[name].dtype == x.dtype
        assert device == "meta" or torch.equal(made[name].cpu(), x)


ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Pinned:
    """Batches of 64 MB that lie in pinned memory already: the copy alone takes long."""

    def __init__(self, count):
        self.batches = [{"x": torch.full((4096, 4096), float(t)).pin_memory(), "name": str(t)} for t in range(count)]

    def __getitem__(self, t):
        return self.batches[t % len(self.batches)]


def multiplied(x, times):
    for _ in range(times):
        x = x @ x * 1e-4
    return x


@ON_CUDA
@pytest.mark.parametrize("workers", [1, 3])
def test_a_batch_on_cuda_is_whole_whatever_is_copied_and_computed_meanwhile(workers):
    found = []
    for batch in data.prefetch(Pinned(4), 0, 40, depth=3, workers=workers, device="cuda"):
        slow = multiplied(batch["x"], 3)  # the memory of x is wanted by copies while this has not begun
        found.append((batch["name"], torch.stack([batch["x"].min(), batch["x"].max()]), slow[0, 0]))
        del batch, slow
    assert [(name, low_high.tolist()) for name, low_high, _ in found] == [(str(t % 4), [t % 4] * 2) for t in range(40)]


@ON_CUDA
def test_a_stream_of_the_consumers_own_sees_the_batch():
    with torch.cuda.stream(torch.cuda.Stream()):
        sums = [batch["x"].sum() for batch in data.prefetch(Pinned(3), 0, 9, device="cuda")]
        assert [int(x) for x in sums] == [t % 3 * 4096**2 for t in range(9)]


@ON_CUDA
def test_the_copy_of_the_next_batch_overlaps_the_step():
    batches, count = Pinned(3), 30

    def seconds(run):
        run(3)
        torch.cuda.synchronize()
        begun = time.perf_counter()
        run(count)
        torch.cuda.synchronize()
        return time.perf_counter() - begun

    def copying(n):
        for t in range(n):
            batches[t]["x"].to("cuda", non_blocking=True)

    def computing(n):
        x = torch.ones(4096, 4096, device="cuda")
        for _ in range(n):
            multiplied(x, times)

    def both(n):
        for batch in data.prefetch(batches, 0, n, device="cuda"):
            multiplied(batch["x"], times)

    copy, times = seconds(copying), 1
    while seconds(computing) < copy:  # a step that takes about as long as its copy
        times *= 2
    compute = seconds(computing)
    # one after the other they take the sum; side by side the longer of both, and a third for what else there is
    assert seconds(both) < max(copy, compute) + 0.67 * min(copy, compute)


def test_wrong_arguments_are_errors_at_once():
    for wrong in ({"depth": 0}, {"workers": 0}):
        with pytest.raises(ValueError, match="expected depth and workers of 1 or more"):
            data.prefetch(Slow(), 0, 1, **wrong)
