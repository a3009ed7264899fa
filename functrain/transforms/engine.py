"""Which gradient engine is in force: how deep we are inside function transforms, and whether losses are compiled.

Plain attributes of a threading.local, because Dynamo guards on them and cannot trace a ContextVar or a probe of
functorch's interpreter stack.
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
        self.piecewise = False  # value_and_grad compiles the function it differentiates
        self.lean = False  # and so that its backward pass computes again what costs no matrix product
        self.blocks: list[Any] = []  # what nn.stack has met while Dynamo traces a loss: each kind's block and inputs
        self.layers_kept = 1.0  # the part of an nn.stack's layers that keep their activations, others are recomputed
        self.layers_policy: Any = ("nothing", ())  # what the recomputed layers keep, which arguments wait in the host
        self.memory_budgets: list[float] = []  # what recompute has asked of the loss that Dynamo traces
        self.plain = False  # recompute keeps everything, as there is no backward pass to come
        self.recomputing = False  # Dynamo traces a function that will be recomputed as a whole
        self.tracing = False  # ft.compile runs the function to see its operations


here = _Here()


def nested() -> bool:
    """Tell whether somebody outside transforms the function that is running: then only torch.func is right."""
    if here.depth > 0:
        return True
    if torch.compiler.is_compiling():
        return False
    # private: the only way to see a torch.func transform that the caller applied without us; guarded by a test
    return torch._C._functorch.peek_interpreter_stack() is not None


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
    if torch.compiler.is_compiling():
        return here.depth > 1  # Dynamo, which sees no interpreters, traces a loss that is differentiated from outside
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
    return not (nested() or here.tracing or torch.compiler.is_compiling())


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


@contextmanager
def compiling_losses(*, keep_less: bool = False) -> Iterator[None]:
    """Let every outermost `value_and_grad` inside compile the function it differentiates, each as one graph."""
    before = here.piecewise, here.lean
    here.piecewise, here.lean = True, keep_less
    try:
        yield
    finally:
        here.piecewise, here.lean = before


@contextmanager
def tracing_operations() -> Iterator[None]:
    """Let a compiled function that is called inside run as the plain function that it is, to be traced."""
    before, here.tracing = here.tracing, True
    try:
        with threefry.traced():
            yield
    finally:
        here.tracing = before
