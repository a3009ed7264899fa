"""Which gradient engine is in force: how deep we are inside function transforms, and who traces what runs.

Plain attributes of a threading.local: a loader's thread may map a function beside a step. Nothing here imports the
compiler, which takes two seconds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from functrain.random import threefry


class _Here(threading.local):
    """What is so in this thread."""

    def __init__(self) -> None:
        self.depth = 0  # transforms of ours around the current call
        self.by_autograd = False  # the call is differentiated by torch.autograd, which torch.func does not see
        self.layers_kept = 1.0  # the part of an nn.stack's layers that keep their activations, others are recomputed
        self.layers_policy: Any = ("nothing", ())  # what the recomputed layers keep, which arguments wait in the host
        self.plain = False  # recompute keeps everything, as there is no backward pass to come
        self.tracing = False  # the function is run to see its operations
        self.again = False  # for the second time, because of a write that the first did not follow
        self.cutter: Any = None  # the `cutting.Cutter` of the compilation that is going on
        self.repeats = False  # what runs is one turn of a loop over parts of a batch
        self.lean = False  # a backward pass computes again what costs no matrix product


here = _Here()


def nested() -> bool:
    """Tell whether somebody outside transforms the function that is running: then only torch.func is right."""
    if here.depth > 0:
        return True
    if torch.compiler.is_dynamo_compiling():  # a torch.compile of the user's own, which sees no interpreters
        return False
    # private: the only way to see a torch.func transform that the caller applied without us; guarded by a test
    return torch._C._functorch.peek_interpreter_stack() is not None


def level() -> tuple[int, int]:
    """Return how many transforms are around the current call, ours and torch.func's."""
    return here.depth, len(torch._C._functorch.get_interpreter_stack() or ())


def start_of_gradient(x: torch.Tensor, requires_grad: bool = True) -> torch.Tensor:
    """Return x as what a gradient is taken by, whatever a mode around does with a module's own `requires_grad_`."""
    with torch._C.DisableTorchFunction():
        return x.detach().requires_grad_(requires_grad)


@contextmanager
def differentiating() -> Iterator[None]:
    """Let `twice` know that torch.autograd differentiates what runs inside."""
    before, here.by_autograd = here.by_autograd, True
    try:
        yield
    finally:
        here.by_autograd = before


def twice() -> bool:
    """Tell whether transforms want more than first derivatives in reverse of what is running."""
    if torch.compiler.is_dynamo_compiling():
        return here.depth > 1
    kinds = [interpreter.key() for interpreter in torch._C._functorch.get_interpreter_stack() or ()]
    reverse = kinds.count(torch._C._functorch.TransformType.Grad) + here.by_autograd
    return torch._C._functorch.TransformType.Jvp in kinds or reverse > 1


def mapped() -> bool:
    """Tell whether what is running is mapped over by `torch.func.vmap`."""
    kinds = [interpreter.key() for interpreter in torch._C._functorch.get_interpreter_stack() or ()]
    return torch._C._functorch.TransformType.Vmap in kinds


def without_recompute(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that runs `fn` with what it recomputes as it stands."""

    def run(*args: Any, **kwargs: Any) -> Any:
        before, here.plain = here.plain, True
        try:
            return fn(*args, **kwargs)
        finally:
            here.plain = before

    return run


def concrete() -> bool:
    """Tell whether tensors are numbers that can be looked at, for an error where there would be a NaN."""
    return not (nested() or here.tracing or torch.compiler.is_dynamo_compiling())


def with_layers(fn: Callable[..., Any], kept: float, policy: Any) -> Callable[..., Any]:
    """Make a function that runs `fn` with these settings, also where the backward pass runs it again."""

    def run(*args: Any, **kwargs: Any) -> Any:
        before = here.layers_kept, here.layers_policy
        here.layers_kept, here.layers_policy = kept, policy
        try:
            return fn(*args, **kwargs)
        finally:
            here.layers_kept, here.layers_policy = before

    return run


def as_here(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that runs `fn` as it would run now, in whatever thread a backward pass runs it again."""
    depth, with_settings = here.depth, with_layers(fn, here.layers_kept, here.layers_policy)

    def run(*args: Any, **kwargs: Any) -> Any:
        before, here.depth = here.depth, max(here.depth, depth)
        try:
            return with_settings(*args, **kwargs)
        finally:
            here.depth = before

    return run


def cuts_losses() -> bool:
    """Tell whether a gradient that is taken now is traced apart."""
    return here.cutter is not None and here.cutter.cuts_losses()


def partitions() -> bool:
    """Tell whether what runs is traced for torch's partitioner, which decides what a backward pass computes again."""
    return here.cutter is not None and here.cutter.partitions()


@contextmanager
def repeating() -> Iterator[None]:
    """Let a trace inside look once at gradients that are taken again and again, and spare memory: who cuts a batch has
    more than fits."""
    before = here.repeats, here.lean
    here.repeats = here.lean = True
    try:
        yield
    finally:
        here.repeats, here.lean = before


@contextmanager
def tracing_again() -> Iterator[None]:
    """Let who counts traces know that what runs inside has been counted."""
    before, here.again = here.again, True
    try:
        yield
    finally:
        here.again = before


@contextmanager
def tracing_operations(cutter: Any = None) -> Iterator[None]:
    """Let a compiled function that is called inside run as the plain function that it is, to be traced."""
    before = here.tracing, here.cutter
    here.tracing, here.cutter = True, cutter
    # modules ask this before they look at the numbers in a mask
    compiling, torch.compiler._is_compiling_flag = torch.compiler._is_compiling_flag, True
    try:
        with threefry.traced():
            yield
    finally:
        here.tracing, here.cutter = before
        torch.compiler._is_compiling_flag = compiling
