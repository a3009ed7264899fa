"""Jobs of the C++ compiler, run while Python goes on.

Inductor starts a compiler process for each kernel, and waits for all kernels of a graph before it turns to the next
graph. It also begins by compiling small programs that tell which vector instructions there are, one after another,
for 3 s each. Here both run beside the tracing and lowering, which keep one core busy: a first step from cold caches
takes two thirds of the time.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.cpu_vec_isa import supported_vec_isa_list, x86_isa_checker


def start_checks(inputs: Iterable[Any]) -> None:
    """Begin to find out, in the background, what the CPU and its compiler can do, if a tensor lies on the CPU."""
    if any(isinstance(value, Tensor) and value.device.type == "cpu" for value in inputs):
        _checks()


def finish_checks() -> None:
    """Wait for what `start_checks` began, whose results torch keeps; an error comes again where torch asks for them."""
    if _checks.cache_info().currsize:
        for check in _checks():
            check.exception()


@functools.cache
def _checks() -> list[Future[bool]]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return []  # nothing to compile
    flags = x86_isa_checker()
    pool = ThreadPoolExecutor(2, thread_name_prefix="functrain-compiler-checks")
    checks = [pool.submit(bool, isa) for isa in supported_vec_isa_list if all(f in flags for f in str(isa).split())]
    pool.shutdown(wait=False)
    return checks


@contextmanager
def together(inputs: Iterable[Any]) -> Iterator[None]:
    """Wait for the kernels of all graphs that are compiled inside at the end, so that they are compiled side by side.

    A graph compiled inside must not run before. On a GPU torch needs a graph's kernels at once, and waits for them.
    """
    wait = AsyncCompile.wait
    if not all(value.device.type == "cpu" for value in inputs if isinstance(value, Tensor)) or wait is not _WAIT:
        yield
        return
    waiting: list[tuple[AsyncCompile, dict[str, Any]]] = []

    def remember(self: AsyncCompile, scope: dict[str, Any]) -> None:
        waiting.append((self, scope))

    AsyncCompile.wait = remember  # type: ignore[method-assign]
    try:
        yield
    finally:
        AsyncCompile.wait = wait  # type: ignore[method-assign]
    for jobs, scope in waiting:
        jobs.wait(scope)


_WAIT = AsyncCompile.wait
