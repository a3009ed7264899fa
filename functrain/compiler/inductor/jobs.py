"""Jobs of the C++ compiler, run while Python goes on.

torch's compiler waits for all kernels of a graph before it turns to the next graph. It also begins by compiling small
programs that tell which vector instructions there are, one after another, for 3 s each, and then its header. Here all
that runs beside the tracing and lowering, which keep one core busy.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._dynamo.convert_frame import compile_lock
from torch._inductor.async_compile import AsyncCompile, get_compile_threads
from torch._inductor.cpu_vec_isa import VecISA, supported_vec_isa_list, x86_isa_checker

from functrain.compiler.inductor import kernels
from functrain.compiler.inductor.kernels import Kernel

# torch's own lock: its compiler, and what is put in its place here, is one for all threads of a process, those that
# call torch.compile included
alone = compile_lock


def start_checks(inputs: Iterable[Any]) -> None:
    """Begin to find out, in the background, what the CPU and its compiler can do, if a tensor lies on the CPU."""
    if any(isinstance(value, Tensor) and value.device.type == "cpu" for value in inputs):
        _checks()
        if not kernels.has_headers():  # or it may be there, and looking takes a while that only a new kernel is worth
            _header()


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
    checks = [pool.submit(_check, isa) for isa in supported_vec_isa_list if all(f in flags for f in str(isa).split())]
    pool.shutdown(wait=False)
    return checks


def _check(isa: VecISA) -> bool:
    """Ask torch whether the compiler knows vector instructions. It compiles its headers of vectors for each kind, for
    2 s, which torch itself was built of where it works with vectors as wide."""
    built = {"AVX2": 256, "AVX512": 512}.get(torch.backends.cpu.get_cpu_capability(), 0)
    compiles: Any = isa.check_build
    isa.check_build = lambda code: (  # type: ignore[method-assign]
        (code == VecISA._avx_code and isa.bit_width() <= built) or compiles(code)
    )
    try:
        return bool(isa)
    finally:
        del isa.check_build


@functools.cache
def _header() -> Future[str | None]:
    """Begin to compile torch's header, after what depends on the processor."""

    def run() -> str | None:
        finish_checks()
        return kernels.compile_header()

    pool = ThreadPoolExecutor(1, thread_name_prefix="functrain-compiler-header")
    header = pool.submit(run)
    pool.shutdown(wait=False)
    return header


def _finish_header() -> str | None:
    # an error may have gone since, as that of a full disk
    return _header().result() if _header().exception() is None else kernels.compile_header()


@contextmanager
def together(inputs: Iterable[Any]) -> Iterator[None]:
    """Wait for the kernels of all graphs that are compiled inside at the end, so that they are compiled side by side.

    A graph compiled inside must not run before. On a GPU torch needs a graph's kernels at once, and waits for them.
    """
    if not all(value.device.type == "cpu" for value in inputs if isinstance(value, Tensor)) or _Waiting.active:
        yield
        return
    waiting = _Waiting()
    with waiting.pool, patch.object(_Waiting, "active", True), waiting.in_place():
        yield
    waiting.finish()


class _Waiting:
    """Kernels that are being compiled."""

    active = False

    def __init__(self) -> None:
        self.cores = get_compile_threads()
        self.pool = ThreadPoolExecutor(self.cores, thread_name_prefix="functrain-compiler")
        self.begun: list[tuple[Kernel, Future[Any]]] = []  # of the graph that is being compiled
        self.graphs: list[tuple[AsyncCompile, dict[str, Any]]] = []

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let torch's compiler leave its kernels here."""

        def kernel(_: AsyncCompile, types: list[str], code: str) -> Any:
            self.begun.append((Kernel(types, code), Future()))
            return self.begun[-1][1]

        def wait(jobs: AsyncCompile, scope: dict[str, Any]) -> None:
            begun, self.begun = self.begun, []
            for part in kernels.libraries([kernel for kernel, _ in begun], self.cores):
                self.pool.submit(_load, [begun[i] for i in part])
            self.graphs.append((jobs, scope))

        with patch.object(AsyncCompile, "cpp_pybinding", kernel), patch.object(AsyncCompile, "wait", wait):
            yield

    def finish(self) -> None:
        for jobs, scope in self.graphs:
            scope.update({name: value.result() for name, value in scope.items() if isinstance(value, Future)})
            jobs.wait(scope)


def _load(begun: list[tuple[Kernel, Future[Any]]]) -> None:
    try:
        functions = kernels.load([kernel for kernel, _ in begun], _finish_header)
    except BaseException as error:
        for _, future in begun:
            future.set_exception(error)
        return
    for (_, future), function in zip(begun, functions, strict=True):
        future.set_result(function)
