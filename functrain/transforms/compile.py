"""Compilation of whole functions, with the buffers of the first argument reused.

`ft.compile` has two ways, and chooses by the size of the first argument (see docs/compile.md):

- whole: one graph for everything. A call costs some 100 us, which decides for small models.
- piecewise, for a `Staged` function from 1 MiB of state on: each loss is a graph of its own, differentiated through
  the partitioner, which saves less memory for the backward pass than one graph does; layers of `nn.stack` are
  compiled once; the update shares one kernel between leaves that it treats alike.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrain import tree
from functrain.transforms import donation, engine, leafwise

_PIECEWISE_BYTES = 2**20

# private: off by default in torch 2.11 to 2.13, and without it Dynamo does not trace torch.autograd.grad; tested
_TRACE_AUTOGRAD = torch._dynamo.config.patch(trace_autograd_ops=True)


class Staged:
    """A function in two stages, `second(first_argument, first(*args))`: one differentiates, the other updates.

    Only `ft.compile` looks at the stages, to compile them apart.
    """

    def __init__(self, first: Callable[..., Any], second: Callable[[Any, Any], Any]) -> None:
        self.first, self.second = first, second

    def __call__(self, *args: Any) -> Any:
        return self.second(args[0], self.first(*args))


class CompilerNotFoundError(RuntimeError):
    """There is no C++ compiler on this machine, and torch.compile needs one for the CPU."""


def compile(fn: Callable[..., Any], *, donate: bool = False) -> Callable[..., Any]:
    """Compile a pure function of trees, whole: nothing falls back to eager, and an operation that cannot be compiled
    is an error.

    With `donate`, `fn` returns `(new, ...)` with `new` like its first argument, whose memory `new` takes over: the
    peak is lower by the size of the state, and touching the old tensors raises `ConsumedError`. Equals `fn` to
    floating-point rounding. A change of a value never compiles again; a change of a shape or dtype does.

    Raises: CompilerNotFoundError at the first call on a machine without a C++ compiler; TypeError, ValueError for a
    first argument that cannot be donated.
    """
    whole = _Graph(fn, donate, "inductor")
    if not isinstance(fn, Staged):
        return whole
    update = _Graph(fn.second, donate, leafwise.backend)
    checked = False

    def step(state: Any, *args: Any) -> Any:
        nonlocal checked
        if tree.bytes(state) >= _PIECEWISE_BYTES:
            with torch.no_grad(), engine.compiling_losses():
                middle = _or_explain(fn.first, state, *args)
            return update(state, middle)
        if not checked:
            with torch.no_grad():
                fn.first(state, *args)  # a detached loss is an error in eager, and would be zeros in a graph
            checked = True
        return whole(state, *args)

    return step


class _Graph:
    """A function as one graph, with its first argument's memory reused for the first of its results."""

    def __init__(self, fn: Callable[..., Any], donate: bool, backend: Any) -> None:
        self.donate = donate

        def in_place(state: Any, *args: Any) -> Any:
            new, *rest = fn(state, *args)
            tree.check_same_structure(state, new, what="ft.compile(donate=True): the first argument and result")
            for old, value in zip(tree.leaves(state), tree.leaves(new), strict=True):
                old.copy_(value)
            return rest

        self.run = torch.compile(in_place if donate else fn, fullgraph=True, dynamic=False, backend=backend)

    def __call__(self, state: Any, *args: Any) -> Any:
        if not self.donate:
            with torch.no_grad(), _TRACE_AUTOGRAD:
                return _or_explain(self.run, state, *args)
        leaves, structure = tree.flatten(state)
        donation.check_donatable(state, leaves)
        with torch.no_grad(), _TRACE_AUTOGRAD:
            rest = _or_explain(self.run, state, *args)
        return (tree.unflatten(structure, donation.pass_on(leaves)), *rest)


def _or_explain(fn: Callable[..., Any], *args: Any) -> Any:
    try:
        return fn(*args)
    except Exception as error:
        if any(isinstance(e, torch._inductor.exc.InvalidCxxCompiler) for e in _causes(error)):
            raise CompilerNotFoundError(
                "ft.compile: no C++ compiler found, and torch.compile needs one for the CPU; install g++ or clang++ "
                "(or set CXX to one), or leave out ft.compile: the step runs in eager as it is"
            ) from error
        raise


def _causes(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return chain
