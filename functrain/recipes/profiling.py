"""Where the time and the memory of a training step go, by torch.profiler."""

from __future__ import annotations

import gzip
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from functrain import data
from functrain.data.atomic import replacing
from functrain.data.background import Indexable
from functrain.progress import Progress, counter
from functrain.train import TrainState
from functrain.train.loop import Step

STEP, INPUT = "functrain: a step", "functrain: waiting for a batch"


class Operation(NamedTuple):
    name: str
    calls: float  # each number is that of one step
    self_seconds: float  # without the operations that it calls; on a GPU the time of its kernels there
    self_bytes: float  # that it took and did not give back


class Profile(NamedTuple):
    first_seconds: float  # of the first step, which compiles
    step_seconds: float  # of a step without the profiler
    input_share: float  # of that time the share in which the next batch was waited for
    idle_share: float  # of a profiled step the share in which no kernel runs, on a CPU no operation of torch
    gaps: float  # stretches of a step without a kernel
    longest_gap_seconds: float
    operations: tuple[Operation, ...]  # the longest first
    peak_bytes: int  # on a GPU of its tensors, on a CPU of the process


def profiled(
    step: Step,
    state: TrainState,
    batches: Indexable[Any],
    *,
    device: torch.device,
    warmup: int,
    active: int,
    trace: Path,
    progress: Progress | None = None,
) -> Profile:
    """Run a step, and say where its time goes: once to compile, `warmup` times unseen, `active` times by the clock
    alone, and as often under torch.profiler, whose events are written to `trace`.

    The trace is a file for chrome://tracing and ui.perfetto.dev, zipped where its name ends in .gz. `progress` counts
    steps. The state that was given is given away where the step is donated.
    """
    count = 1 + warmup + 2 * active
    ahead = data.prefetch(batches, 0, count, device=device)
    add = counter(count, progress)

    def run(times: int) -> tuple[float, float]:
        """Run steps, and return their seconds and those of waiting for their batches."""
        nonlocal state
        begun, waited = time.perf_counter(), 0.0
        for _ in range(times):
            asked = time.perf_counter()
            with record_function(INPUT):
                batch = next(ahead)
            waited += time.perf_counter() - asked
            with record_function(STEP):
                state, _metrics = step(state, batch)
            add(1)
        _wait(device)
        return time.perf_counter() - begun, waited

    first, _ = run(1)
    run(warmup)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds, waited = run(active)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _process_bytes()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    found = profile(activities=activities, profile_memory=True)
    with _quiet():
        found.start()
    run(active)
    with _quiet():
        found.stop()
    _write(found, trace)
    idle, gaps, longest = _idle(list(found.events() or []), device)
    return Profile(
        first_seconds=first,
        step_seconds=seconds / active,
        input_share=waited / seconds,
        idle_share=idle,
        gaps=gaps / active,
        longest_gap_seconds=longest,
        operations=_operations(found.key_averages(), device, active),
        peak_bytes=peak,
    )


def _operations(averages: Any, device: torch.device, steps: int) -> tuple[Operation, ...]:
    on_gpu = device.type == "cuda"
    found = []
    for row in averages:
        seconds = (row.self_device_time_total if on_gpu else row.self_cpu_time_total) / 1e6
        size = row.self_device_memory_usage if on_gpu else row.self_cpu_memory_usage
        found.append(Operation(row.key, row.count / steps, seconds / steps, size / steps))
    return tuple(sorted(found, key=lambda row: -row.self_seconds))


def _idle(events: list[FunctionEvent], device: torch.device) -> tuple[float, int, float]:
    """Return the share of the time in which nothing runs, how often that is, and the longest such stretch in seconds.

    The time is from the begin of the first step to the end of what runs last.
    """
    kind = "CUDA" if device.type == "cuda" else "CPU"
    ours = [e for e in events if e.name == STEP and e.device_type.name == "CPU"]
    ran = sorted(
        (e.time_range.start, e.time_range.end) for e in events if e.device_type.name == kind and not _is_ours(e)
    )
    begin = min(e.time_range.start for e in ours)
    end = max([e.time_range.end for e in ours] + [end for _, end in ran])
    gaps = [gap for gap in _gaps([row for row in ran if row[1] > begin], begin, end) if gap > 0.0]
    return sum(gaps) / (end - begin), len(gaps), max(gaps, default=0.0) / 1e6


def _is_ours(event: FunctionEvent) -> bool:
    return event.name in (STEP, INPUT)


def _gaps(ran: list[tuple[float, float]], begin: float, end: float) -> Iterator[float]:
    last = begin
    for start, stop in ran:
        yield start - last
        last = max(last, stop)
    yield end - last


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop what torch's profiler says to its developers, past Python, on standard error."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _write(found: profile, trace: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "trace.json")  # torch writes to a name, and not whole or not at all
        found.export_chrome_trace(str(made))
        with replacing(trace) as file:
            file.write(gzip.compress(made.read_bytes()) if trace.suffix == ".gz" else made.read_bytes())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _process_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
