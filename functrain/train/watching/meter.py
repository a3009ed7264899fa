"""Steps to rows: metrics read from the device many steps at once, and what clock and machine say beside them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrain.train.watching.rows import Row


class Meter:
    """Steps that wait to be read, and the rows that they become.

    A row has "step"; the step's metrics; "epoch", "learning_rate"; "time", in seconds since 1970, and "seconds" of the
    whole run, evaluations and saves included; rates, of the rows that are read together, without these; "memory".
    """

    def __init__(
        self,
        what: str,
        *,
        every: int,
        learning_rate: Callable[[Any], Any] | None,
        steps_per_epoch: float | None,
        samples: int | str | None,
        tokens: int | str | None,
        flops: float | None,
        peak_flops: float | None,
    ) -> None:
        if type(every) is not int or every < 1:
            raise ValueError(f"{what}: expected every of at least 1 step, came {every!r}")
        if (flops is None) != (peak_flops is None):
            raise ValueError(
                f"{what}: expected flops, those of a step, and peak_flops, those that the device can do in a second, "
                "or neither, came one of them"
            )
        self._what, self._every = what, every
        self._learning_rate, self._steps_per_epoch = learning_rate, steps_per_epoch
        self._counted = {"samples_per_second": samples, "tokens_per_second": tokens}
        self._flops, self._peak_flops = flops, peak_flops
        self._first: int | None = None  # the first step of this process
        self._began, self._since = time.time(), time.perf_counter()
        self._waiting: list[tuple[int, float, dict[str, Any]]] = []
        self._device = torch.device("cpu")

    def begin(self, done: int, seconds: float) -> None:
        """Go on after step `done` of a run that took so many seconds until then. What waits has been read."""
        # the first step of a process, which compiles, is read by itself: no rate of other steps holds its time, and it
        # shows that the run lives
        self._first = done + 1 if self._first is None else self._first
        self._began = time.time() - seconds
        self._since = time.perf_counter()

    def add(self, t: int, state: Any, metrics: dict[str, Any]) -> bool:
        """Let a step wait, and tell whether it is time to read."""
        self._waiting.append((t, time.time(), dict(metrics)))
        self._device = getattr(getattr(state, "key", None), "device", self._device)
        return t % self._every == 0 or t == self._first

    def aside(self, seconds: float) -> None:
        """Leave so long out of the rates: evaluations, saves."""
        self._since += seconds

    def read(self) -> list[Row]:
        """Return the rows of all steps that wait; waits for the device."""
        if not self._waiting:
            return []
        numbers = self._numbers([metrics for _, _, metrics in self._waiting])
        seconds = max(time.perf_counter() - self._since, 1e-9)
        of_all = self._rates(numbers, seconds) | _memory(self._device)
        if len(numbers) == 1 and self._waiting[0][0] == self._first:
            of_all["first_step_seconds"] = seconds
        found = [self._row(t, at, row) | of_all for (t, at, _), row in zip(self._waiting, numbers, strict=True)]
        self._waiting.clear()
        self._since = time.perf_counter()
        return found

    def _numbers(self, steps: list[dict[str, Any]]) -> list[Row]:
        """Read numbers and () tensors, those of all steps at once."""
        tensors = [(name, value) for metrics in steps for name, value in metrics.items() if isinstance(value, Tensor)]
        for name, value in tensors:
            if value.numel() != 1:
                raise ValueError(
                    f"{self._what}: {name}: expected a () tensor, came {tuple(value.shape)}, as the lanes of a sweep "
                    "have; call a record for each lane with its metrics"
                )
        # float64 on the host: not every device has it
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for _, value in tensors:
            by_dtype.setdefault(value.dtype, []).append(value.detach().reshape(()))
        read = {dtype: iter(torch.stack(values).cpu().double().tolist()) for dtype, values in by_dtype.items()}
        return [
            {name: next(read[v.dtype]) if isinstance(v, Tensor) else float(v) for name, v in metrics.items()}
            for metrics in steps
        ]

    def _row(self, t: int, at: float, numbers: Row) -> Row:
        row: Row = {"step": t, **numbers}
        if self._steps_per_epoch is not None:
            row["epoch"] = t / self._steps_per_epoch
        if self._learning_rate is not None:  # of the update that made this step: its count of updates was t - 1
            row["learning_rate"] = float(self._learning_rate(torch.tensor(t - 1)))
        return row | {"time": at, "seconds": at - self._began}

    def _rates(self, numbers: list[Row], seconds: float) -> Row:
        rates: Row = {}
        for name, of in self._counted.items():
            if isinstance(of, str):
                rates[name] = sum(self._count(row, of) for row in numbers) / seconds
            elif of is not None:
                rates[name] = of * len(numbers) / seconds
        if self._flops is not None and self._peak_flops is not None:
            rates["model_flops_utilization"] = self._flops * len(numbers) / seconds / self._peak_flops
        return rates

    def _count(self, row: Row, name: str) -> float:
        if name not in row:
            raise ValueError(
                f"{self._what}: expected a metric {name!r} that counts, came {', '.join(row)}; name one of these, or "
                "give the number of each step"
            )
        return row[name]


def _memory(device: torch.device) -> Row:
    """Return the most memory that was in use so far, in bytes."""
    found: Row = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        found["process_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.type == "cuda":
        found["device_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return found
