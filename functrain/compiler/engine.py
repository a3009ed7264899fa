"""Which gradient engine is in force: how deep we are inside function transforms, and who traces what runs.

Of each thread, as a loader's may map a function beside a step. Nothing here imports the compiler, which takes two
seconds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from functrain.random import threefry


@dataclass
class Here(threading.local):
    """What is so in this thread, while the functions run that say so. Each field says who sets it, and why it is no
    argument: between who sets and who reads it lies code of the caller's, or of torch's."""

    # `grad`, `vmap` and what is made of them: transforms of ours around the call. Inner gradients go by torch.func
    depth: int = 0
    # `grad` by torch.autograd, and recomputed calls, which torch.func does not see: attention and norms choose formulas
    by_autograd: bool = False
    # `recompute_layers`: the part of an `nn.stack`'s layers that keep their activations, what the others keep, and
    # which of their arguments wait in the host
    layers: tuple[float, Any, tuple[int, ...]] = (1.0, "nothing", ())
    # a recomputed call under a map: `recompute` inside keeps everything, as there is no backward pass to come
    plain: bool = False
    # `ft.compile`: the function runs to show its operations, and numbers cannot be read
    tracing: bool = False
    # the trace, when it begins anew because of a write that it did not follow: who counts traces counts one
    again: bool = False
    # `ft.compile`: the `cutting.Cutter` of the compilation that is going on, to which layers and gradients are handed
    cutter: Any = None
    # `accumulate` and per-example gradients: what runs is one turn of a loop over parts of a batch, so that a trace
    # looks once at what comes again
    repeats: bool = False
    # the same: a backward pass computes again what costs no matrix product
    lean: bool = False


here = Here()


class entered:
    """Let fields of `here` have these values inside: `with entered(depth=2): ...`."""

    def __init__(self, **values: Any) -> None:
        unknown = [name for name in values if name not in Here.__dataclass_fields__]
        assert not unknown, f"engine.entered: no field {unknown}"
        self.values = values

    def __enter__(self) -> None:
        fields = vars(here)
        self.before = {name: fields[name] for name in self.values}
        fields.update(self.values)

    def __exit__(self, *error: object) -> None:
        vars(here).update(self.before)


def deeper() -> AbstractContextManager[None]:
    """Let what runs inside know of one more transform around it."""
    return entered(depth=here.depth + 1)


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


def differentiating() -> AbstractContextManager[None]:
    """Let `twice` know that torch.autograd differentiates what runs inside."""
    return entered(by_autograd=True)


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


def running(fn: Callable[..., Any], **values: Any) -> Callable[..., Any]:
    """Make a function that runs `fn` with these fields, also where a backward pass runs it again."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with entered(**values):
            return fn(*args, **kwargs)

    return run


def concrete() -> bool:
    """Tell whether tensors are numbers that can be looked at, for an error where there would be a NaN."""
    return not (nested() or here.tracing or torch.compiler.is_dynamo_compiling())


def as_here(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that runs `fn` as it would run now, in whatever thread a backward pass runs it again."""
    depth, layers = here.depth, here.layers

    def run(*args: Any, **kwargs: Any) -> Any:
        with entered(depth=max(here.depth, depth), layers=layers):
            return fn(*args, **kwargs)

    return run


def cuts_losses() -> bool:
    """Tell whether a gradient that is taken now is traced apart."""
    return here.cutter is not None and here.cutter.cuts_losses()


def partitions() -> bool:
    """Tell whether what runs is traced for torch's partitioner, which decides what a backward pass computes again."""
    return here.cutter is not None and here.cutter.partitions()


def repeating() -> AbstractContextManager[None]:
    """Let a trace inside look once at gradients that are taken again and again, and spare memory: who cuts a batch has
    more than fits."""
    return entered(repeats=True, lean=True)


@contextmanager
def tracing_operations(cutter: Any = None) -> Iterator[None]:
    """Let a compiled function that is called inside run as the plain function that it is, to be traced."""
    # modules ask this before they look at the numbers in a mask
    compiling, torch.compiler._is_compiling_flag = torch.compiler._is_compiling_flag, True
    try:
        with entered(tracing=True, cutter=cutter), threefry.traced():
            yield
    finally:
        torch.compiler._is_compiling_flag = compiling
