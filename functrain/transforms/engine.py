"""Which gradient engine is in force: how deep we are inside function transforms, and whether losses are compiled.

Two plain module globals, because Dynamo guards on a global and cannot trace a ContextVar or a probe of functorch's
interpreter stack. They are process-wide: transforms are entered from one thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from functrain import random

depth = 0  # transforms of ours around the current call
piecewise = False  # value_and_grad compiles the function it differentiates
lean = False  # and so that its backward pass computes again what costs no matrix product, in place of keeping it
blocks: list[Any] = []  # what nn.stack has met while Dynamo traces a loss: a block and its inputs, for each kind
layers_kept = 1.0  # the part of the layers of an nn.stack that keep their activations, the others are recomputed
layers_policy: Any = ("nothing", ())  # what the recomputed layers keep, and which arguments wait in host memory
memory_budgets: list[float] = []  # what recompute has asked of the loss that Dynamo traces
recomputing = False  # Dynamo traces a function that will be recomputed as a whole
tracing = False  # ft.compile runs the function to see its operations


def nested() -> bool:
    """Tell whether somebody outside transforms the function that is running: then only torch.func is right."""
    if depth > 0:
        return True
    if torch.compiler.is_compiling():
        return False
    # private: the only way to see a torch.func transform that the caller applied without us; guarded by a test
    return torch._C._functorch.peek_interpreter_stack() is not None


def concrete() -> bool:
    """Tell whether tensors are numbers that can be looked at, for an error where there would be a NaN."""
    return not (nested() or tracing or torch.compiler.is_compiling())


def with_layers(fn: Callable[..., Any], kept: float, policy: Any) -> Callable[..., Any]:
    """Make a function that runs `fn` with these settings, also where the backward pass runs it again."""

    def run(*args: Any, **kwargs: Any) -> Any:
        global layers_kept, layers_policy
        before = layers_kept, layers_policy
        layers_kept, layers_policy = kept, policy
        try:
            return fn(*args, **kwargs)
        finally:
            layers_kept, layers_policy = before

    return run


@contextmanager
def compiling_losses(*, keep_less: bool = False) -> Iterator[None]:
    """Let every outermost `value_and_grad` inside compile the function it differentiates, each as one graph."""
    global piecewise, lean
    before, piecewise, lean = (piecewise, lean), True, keep_less
    try:
        yield
    finally:
        piecewise, lean = before


@contextmanager
def tracing_operations() -> Iterator[None]:
    """Let a compiled function that is called inside run as the plain function that it is, to be traced."""
    global tracing
    before, tracing = tracing, True
    try:
        with random.traced():
            yield
    finally:
        tracing = before
