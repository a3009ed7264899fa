"""Compilation of whole functions, with the buffers of the first argument reused.

A function is traced by running it once on tensors without data, as JAX does, and the operations seen are compiled.
`ft.compile` has two ways for a `Staged` function, and chooses by the size of its first argument (see docs/compile.md):

- whole: one graph for everything. A call costs some 100 us, which decides for small models. An update of many leaves,
  which any function without matrix products may be, shares one kernel between leaves that it treats alike.
- piecewise, from 1 MiB on: each loss is a graph of its own, differentiated through the partitioner, which saves less
  memory for the backward pass than one graph does; layers of `nn.stack` are compiled once; the update shares kernels.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from functrain import tree
from functrain.transforms import donation, engine

_PIECEWISE_BYTES = 2**20

Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Sequence[Any]]]


class Staged:
    """A function in two stages, `second(first_argument, first(*args))`: one differentiates, the other updates.

    Only `ft.compile` looks at the stages, to compile them apart: always where the first is `looped`, so that a loop
    over parts of a batch does not become a graph as long as the loop.
    """

    def __init__(self, first: Callable[..., Any], second: Callable[[Any, Any], Any], *, looped: bool = False) -> None:
        self.first, self.second, self.looped = first, second, looped

    def __call__(self, *args: Any) -> Any:
        return self.second(args[0], self.first(*args))


class CompilerNotFoundError(RuntimeError):
    """There is no C++ compiler on this machine, and compiling for the CPU needs one."""


def compile(fn: Callable[..., Any], *, donate: bool = False) -> Callable[..., Any]:
    """Compile a pure function of trees, whole: nothing falls back to eager, and an operation that cannot be compiled
    is an error.

    With `donate`, `fn` returns `(new, ...)` with `new` like its first argument, whose memory `new` takes over: the
    peak is lower by the size of the state, and touching the old tensors raises `ConsumedError`. Equals `fn` to
    floating-point rounding. `fn` runs as Python once for each structure, shape, dtype, and value of an argument that
    is no tensor, and for another default dtype or autocast around the call; the value of a tensor never compiles again.
    Goes outermost: `compile(grad(f))`, not the reverse.

    Raises: CompilerNotFoundError at the first call on a machine without a C++ compiler; TypeError, ValueError for a
    first argument that cannot be donated; TypeError for an argument that is being differentiated or mapped, or that is
    neither a tensor nor has a hash, and for an `fn` that reads the numbers in a tensor.
    """
    # not with the package: Inductor takes two seconds to import, and who does not compile does not need it
    from functrain.transforms import compiler_jobs, leafwise

    whole = _Compiled(fn, donate, _compile_whole)
    if not isinstance(fn, Staged):
        return whole
    update = _Compiled(fn.second, donate, leafwise.compile_graph)
    first, looped = fn.first, fn.looped

    def step(state: Any, *args: Any) -> Any:
        if not looped and (whole.ran or tree.bytes(state) < _PIECEWISE_BYTES):
            return whole(state, *args)
        if not update.ran:
            compiler_jobs.start_checks(tree.leaves((state, args)))
        # who cuts a batch has more than fits: a part keeps less for its backward pass than a whole batch does
        with torch.no_grad(), engine.compiling_losses(keep_less=looped):
            middle = _or_explain(_in_pieces, first, state, *args)
        return update(state, middle)

    return step


def _compile_whole(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Sequence[Any]]:
    """Compile as one program; an update of many leaves, recognized by its lack of matrix products, leaf by leaf."""
    from functrain.transforms import graph_passes, inductor, leafwise

    size = sum(leaf.nbytes for leaf in inputs if isinstance(leaf, Tensor))
    if size >= _PIECEWISE_BYTES and len(inputs) >= _MANY and not graph_passes.has_products(graph.graph):
        return leafwise.compile_graph(graph, inputs)
    return inductor.compile_graph(graph, inputs)


_MANY = 16  # leaves: a kernel for each takes g++ as long as the shared one and its caller


def interpret(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Trace a function as `ft.compile` does, and run the operations that were seen one by one, without a compiler.

    Equals `fn` bit for bit.
    """
    return _Compiled(fn, False, lambda graph, inputs: graph)


class _Compiled:
    """A function compiled for every kind of arguments that it meets."""

    def __init__(self, fn: Callable[..., Any], donate: bool, compiler: Compiler) -> None:
        self.fn, self.donate, self.compiler = fn, donate, compiler
        self.programs: dict[Any, _Program] = {}
        self.last: _Program | None = None
        self.settings: Any = None  # under which the last one was made
        self.returned: list[weakref.ref[Tensor]] = []

    @property
    def ran(self) -> bool:
        return self.last is not None

    def __call__(self, *args: Any) -> Any:
        if engine.here.tracing:
            return self.fn(*args)
        leaves, structure = tree.flatten(args)
        _check_outermost(leaves)  # at every call: a program that is there already would lose the gradient in silence
        program, settings = self.last, _settings()
        if program is None or settings != self.settings or not self._fits_again(program, leaves, structure):
            program = self.last = self._program(args, leaves, structure, settings)
            self.settings = settings
        with torch.no_grad():
            results = program.kernel(*leaves)
        result = tree.unflatten(program.result, results)
        if not self.donate:
            return result
        new = donation.pass_on(leaves[: program.donated])
        self.returned = [weakref.ref(leaf) for leaf in new]
        return (tree.unflatten(program.state, new), *result)

    def _fits_again(self, program: _Program, leaves: list[Any], structure: Any) -> bool:
        """Tell whether the arguments are the tensors that we returned last, and others of the same kinds."""
        known = self.returned
        if not known or structure != program.structure:
            return False
        for ref, leaf in zip(known, leaves, strict=False):
            if ref() is not leaf:
                return False
        return [_kind(leaf) for leaf in leaves[len(known) :]] == program.kinds[len(known) :]

    def _program(self, args: tuple[Any, ...], leaves: list[Any], structure: Any, settings: Any) -> _Program:
        if self.donate:
            donation.check_donatable(args[0], tree.leaves(args[0]))
        kinds = [_kind(leaf) for leaf in leaves]
        key = (structure, tuple(kinds), settings)
        try:
            known = key in self.programs
        except TypeError as error:
            raise _unhashable(args) from error
        if not known:
            self.programs[key] = _or_explain(_Program, self, args, leaves, structure, kinds)
        return self.programs[key]


class _Program:
    """The compiled form of a function for one kind of arguments."""

    def __init__(self, owner: _Compiled, args: tuple[Any, ...], leaves: list[Any], structure: Any, kinds: Any) -> None:
        self.structure, self.kinds = structure, kinds
        self.state = tree.structure(args[0]) if owner.donate else None
        self.donated = len(tree.leaves(args[0])) if owner.donate else 0
        self.result: Any = None

        def flat(*leaves: Any) -> list[Any]:
            result = owner.fn(*tree.unflatten(structure, leaves))
            if owner.donate:
                result = self._store(leaves[: self.donated], result)
            found, self.result = tree.flatten(result)
            return found

        from functrain.transforms import compiler_jobs, inductor

        compiler_jobs.start_checks(leaves)
        with torch.no_grad(), engine.tracing_operations():
            graph = inductor.trace(flat, leaves)
            self.kernel = owner.compiler(graph, leaves)

    def _store(self, old: Sequence[Tensor], result: Any) -> tuple[Any, ...]:
        if not isinstance(result, tuple) or not result:
            raise TypeError(f"ft.compile(donate=True): expected fn to return (new, ...), came {type(result).__name__}")
        like, new = tree.unflatten(self.state, old), result[0]
        tree.check_same_structure(like, new, what="ft.compile(donate=True): the first argument and result")
        for (path, a), b in zip(tree.items(like), tree.leaves(new), strict=True):
            if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
                came = f"{b.dtype} {tuple(b.shape)}" if isinstance(b, Tensor) else repr(b)
                raise TypeError(
                    f"ft.compile(donate=True): {path}: expected {a.dtype} {tuple(a.shape)} as in the first argument, "
                    f"came {came}; keep shapes and dtypes from step to step, or compile with donate=False"
                )
        for a, b in zip(old, tree.leaves(new), strict=True):
            if a is not b:
                a.copy_(b)
        return result[1:]


def _kind(leaf: Any) -> Any:
    """What of a leaf a compiled program depends on."""
    if isinstance(leaf, Tensor):
        return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device, type(leaf))
    return (type(leaf), leaf)


def _settings() -> Any:
    """What beside its arguments a trace depends on: torch's dtypes where none is named, and those of autocast."""
    return (
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
        torch.is_autocast_enabled() and torch.get_autocast_dtype("cuda"),
    )


def _unhashable(args: Any) -> TypeError:
    path, leaf = next((path, leaf) for path, leaf in tree.items(args) if not isinstance(leaf, Hashable))
    return TypeError(
        f"ft.compile: argument {path}: expected a tensor, or a value with a hash, for which a program is made, came "
        f"{type(leaf).__name__}; convert it outside, as by torch.as_tensor(x), or dict(x)"
    )


def _check_outermost(leaves: list[Any]) -> None:
    if engine.nested() or any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
        raise TypeError(
            "ft.compile: a compiled function was called on a tensor that is being differentiated or mapped over; "
            "put ft.compile outermost, as in ft.compile(ft.grad(f)), or detach the argument"
        )


def _in_pieces(first: Callable[..., Any], *args: Any) -> Any:
    try:
        return first(*args)
    except Exception as error:
        from functrain.transforms.untraceable import way_out

        way = way_out(error)
        if way is None:
            raise
        raise NotImplementedError(
            f"ft.compile: a large step is compiled in pieces, and torch's Dynamo cannot trace this loss; {way}. Dynamo "
            f"says: {error}"
        ) from error


def _or_explain(fn: Callable[..., Any], *args: Any) -> Any:
    try:
        return fn(*args)
    except Exception as error:
        from functrain.transforms import inductor, untraceable

        reading = untraceable.reading(error)
        if reading:
            raise TypeError(f"ft.compile: {reading}") from error
        if inductor.no_cxx_compiler(error):
            raise CompilerNotFoundError(
                "ft.compile: no C++ compiler found, and compiling for the CPU needs one; install g++ or clang++ "
                "(or set CXX to one), or leave out ft.compile: the step runs in eager as it is"
            ) from error
        raise
