"""Compilation of whole functions, with the buffers of the first argument reused.

A function is traced by running it once on tensors without data, as JAX does, and the operations seen are compiled: a
small function as one program, and one whose first argument has 1 MiB or more as a list of programs, cut at the layers
of `nn.stack` and at gradients (see docs/compile.md).
"""

from __future__ import annotations

import gc
import operator
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor, fx

from functrain import tree
from functrain.compiler import donation, engine, wrapped
from functrain.compiler.arguments import TIMES, by_position, kind_of, tell_of_another, unhashable
from functrain.compiler.cxx import CompilerNotFoundError, no_compiler

P = ParamSpec("P")
R = TypeVar("R")
# no bound: pyright would read the types of an overloaded function, such as `ft.grad`, from it
Function = TypeVar("Function")
Function_co = TypeVar("Function_co", covariant=True)  # a compiled step is a compiled function
_PIECEWISE_BYTES = 2**20
_PIECEWISE_LEAVES = 64  # as one graph, a step of a GPT of two layers takes a minute to compile, in pieces 13 s


def compile(fn: Function, *, donate: bool = False, cache: str | os.PathLike[str] | None = None) -> Compiled[Function]:
    """Compile a pure function of trees, whole: nothing falls back to eager, and an operation that cannot be compiled
    is an error.

    With `donate`, `fn` returns `(new, ...)` with `new` like its first argument, whose memory `new` takes over: the
    peak is lower by the size of the state, and touching the old tensors raises `ConsumedError`. Equals `fn` to
    floating-point rounding. `fn` runs as Python once for each structure, shape, dtype, and value of an argument that
    is no tensor, and for another default dtype, autocast or `torch.use_deterministic_algorithms` around the call; the
    value of a tensor never compiles again. Goes outermost: `compile(grad(f))`, not the reverse. `describe(*args)` of
    the result is the list of its programs.

    With `cache`, compiled programs are kept in this folder, and taken from it in another process: see docs/compile.md.
    They are machine code, as safe as who has written them. A folder that cannot be written, or holds other files than
    were written there, is told by a warning, and the programs are compiled anew.

    Raises: CompilerNotFoundError at the first call on a machine without a C++ compiler; TypeError, ValueError for a
    first argument that cannot be donated; TypeError for an argument that is being differentiated or mapped, or that is
    neither a tensor nor has a hash, and for an `fn` that reads the numbers in a tensor.

    >>> compiled = ft.compile(lambda params, x: params["w"] * x + 1)
    >>> compiled({"w": torch.tensor(2.0)}, torch.arange(3.0))
    tensor([1., 3., 5.])
    """
    return Compiled(fn, donate, cache=None if cache is None else Path(cache))


def interpret(fn: Callable[P, R]) -> Callable[P, R]:
    """Trace a function as `ft.compile` does, and run the operations that were seen one by one, without a compiler.

    Equals `fn` bit for bit.
    """
    interpreted: Compiled[Callable[P, R]] = Compiled(fn, False, interpreted=True)
    return interpreted


class Compiled(Generic[Function_co]):
    """A function compiled for every kind of arguments that it meets; `fn` is the function itself."""

    def __init__(self, fn: Function_co, donate: bool, *, interpreted: bool = False, cache: Path | None = None) -> None:
        self.fn: Function_co = fn
        self.donate: bool = donate
        self.interpreted: bool = interpreted
        self.cache: Path | None = cache
        self.programs: dict[Any, _Program] = {}
        self.linked: dict[Any, Any] = {}  # what they are made of: a loss of other parts of a batch is the same loss
        self.last: _Program | None = None
        self.settings: Any = None  # under which the last one was made
        self.parts: wrapped.OfParts | None = None  # for arguments of which some wrap plain tensors
        self.returned: list[weakref.ref[Tensor]] = []

    def __call__(self: Compiled[Callable[P, R]], *args: P.args, **kwargs: P.kwargs) -> R:
        if engine.here.tracing:
            return self.fn(*args, **kwargs)
        given: Any = by_position(self.fn, args, kwargs) if kwargs else args
        leaves, structure = tree.flatten(given)
        if any(map(wrapped.is_wrapper, leaves)):
            found: R = self._of_parts()(given)
            return found
        _check_outermost(leaves)  # at every call: a program that is there already would lose the gradient in silence
        program, settings = self.last, _settings()
        if program is None or settings != self.settings or not self._fits_again(program, leaves, structure):
            program = self.last = self._program(given, leaves, structure, settings)
            self.settings = settings
        with torch.no_grad():
            results = program.run(leaves)
        result: Any = tree.unflatten(program.result, results)
        if not self.donate:
            return result
        new = donation.pass_on(leaves[: program.donated])
        self.returned = [weakref.ref(leaf) for leaf in new]
        result = (tree.unflatten(program.state, new), *result)
        return result

    def describe(self: Compiled[Callable[P, Any]], *args: P.args, **kwargs: P.kwargs) -> str:
        """Return the list of calls that the function is compiled to for arguments of these kinds, a line each:
        programs, their operations, and what each keeps for the backward pass.

        Compiles it where it is not, and runs nothing.
        """
        given: Any = by_position(self.fn, args, kwargs) if kwargs else args
        leaves, structure = tree.flatten(given)
        if any(map(wrapped.is_wrapper, leaves)):
            return self._of_parts().describe(given)
        _check_outermost(leaves)
        return "\n".join(self._program(given, leaves, structure, _settings()).describe())

    def _of_parts(self: Compiled[Callable[P, Any]]) -> wrapped.OfParts:
        if self.parts is None:
            self.parts = wrapped.OfParts(
                self.fn,
                self.donate,
                lambda fn: Compiled(fn, self.donate, interpreted=self.interpreted, cache=self.cache),
            )
        return self.parts

    def _fits_again(self, program: _Program, leaves: list[Any], structure: Any) -> bool:
        """Tell whether the arguments are the tensors that we returned last, and others of the same kinds."""
        known = self.returned
        if not known or structure != program.structure:
            return False
        if not all(map(operator.is_, [ref() for ref in known], leaves)):
            return False
        return [kind_of(leaf) for leaf in leaves[len(known) :]] == program.kinds[len(known) :]

    def _program(self, args: tuple[Any, ...], leaves: list[Any], structure: Any, settings: Any) -> _Program:
        if self.donate:
            donation.check_donatable(args[0], tree.leaves(args[0]))
        kinds = [kind_of(leaf) for leaf in leaves]
        key = (structure, tuple(kinds), settings)
        try:
            known = key in self.programs
        except TypeError as error:
            raise unhashable(args) from error
        if not known:
            others = [old for old in self.programs if old[0] == structure and old[2] == settings]
            if len(others) == TIMES:
                tell_of_another(args, others[-1][1], kinds)
            with _no_collection():
                self.programs[key] = _or_explain(_Program, self, args, leaves, structure, kinds)
        return self.programs[key]


class _Program:
    """The compiled form of a function for one kind of arguments."""

    def __init__(
        self, owner: Compiled[Any], args: tuple[Any, ...], leaves: list[Any], structure: Any, kinds: Any
    ) -> None:
        self.structure, self.kinds = structure, kinds
        self.state = tree.structure(args[0]) if owner.donate else None
        self.donated = len(tree.leaves(args[0])) if owner.donate else 0
        self.result: Any = None
        # not with the package: torch's compiler takes two seconds to import
        from functrain.compiler import artefact, cutting, linking, segments, tracing
        from functrain.compiler.inductor import jobs

        where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.where = where if len(where) < len(leaves) else None

        def flat(*tensors: Any) -> Any:
            given = list(leaves)
            for i, x in zip(where, tensors, strict=True):
                given[i] = x
            result = owner.fn(*tree.unflatten(structure, given))
            writes: list[tuple[Tensor, Tensor]] = []
            if owner.donate:
                result, writes = self._stored(given[: self.donated], result)
            found, self.result = tree.flatten(result)
            return found, writes

        tensors = [leaves[i] for i in where]
        # what is a view of the conjugate, or negative, of other memory
        self.lazy = [i for i, x in enumerate(tensors) if x.is_conj() or x.is_neg()]
        tensors = [_plain(x) for x in tensors]

        def build() -> tuple[Any, list[Tensor], int]:
            jobs.start_checks(leaves)
            cutter = cutting.Cutter(layers=_in_pieces(args[:1]))
            with jobs.alone, torch.no_grad():
                with engine.tracing_operations(cutter):
                    traced = cutter.trace(flat, tensors)
                with jobs.together(tensors):
                    operations = segments.size(traced.graph)
                    return linking.Linker(cutter, owner.linked).link(traced), traced.lifted, operations

        def interpreted() -> tuple[Any, list[Tensor], int]:
            with jobs.alone, torch.no_grad(), engine.tracing_operations():
                traced = tracing.trace(lambda mode, *xs: flat(*xs), tensors, decompose=False)
            module = fx.GraphModule({}, traced.graph)
            return (lambda values: module(*values)), traced.lifted, segments.size(traced.graph)

        found = interpreted() if owner.interpreted else artefact.kept_in(owner.cache, build)
        self.kernel, self.lifted, self.operations = found

    def describe(self) -> list[str]:
        if hasattr(self.kernel, "describe"):
            return list(self.kernel.describe())
        return [f"program  {self.operations} operations"]

    def run(self, leaves: list[Any]) -> Any:
        given = list(leaves) if self.where is None else [leaves[i] for i in self.where]
        for i in self.lazy:
            given[i] = _plain(given[i])
        try:
            return self.kernel([*given, *self.lifted])
        except RuntimeError as error:
            if "index out of bounds" not in str(error):
                raise
            raise IndexError(
                "ft.compile: expected each index, such as a token or a label, inside of what it indexes, came one out "
                f"of bounds ({str(error).rpartition(': ')[2]}); call the function without ft.compile to see which"
            ) from error

    def _stored(self, old: Sequence[Tensor], result: Any) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
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
        return result[1:], [(a, b) for a, b in zip(old, tree.leaves(new), strict=True) if a is not b]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from looking for unreachable cycles, again and again among the objects of torch's compiler: a quarter
    of a first step from a filled cache."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _plain(x: Tensor) -> Tensor:
    return x.resolve_conj().resolve_neg()


def _settings() -> Any:
    """What beside its arguments a trace depends on: torch's dtypes where none is named, those of autocast, and whether
    operations must be the same each time."""
    return (
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
        torch.is_autocast_enabled() and torch.get_autocast_dtype("cuda"),
    )


def _check_outermost(leaves: list[Any]) -> None:
    if engine.nested() or any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
        raise TypeError(
            "ft.compile: a compiled function was called on a tensor that is being differentiated or mapped over; "
            "put ft.compile outermost, as in ft.compile(ft.grad(f)), or detach the argument"
        )


def _in_pieces(first: tuple[Any, ...]) -> bool:
    return tree.bytes(first) >= _PIECEWISE_BYTES or _PIECEWISE_LEAVES < len(tree.leaves(first))


def _or_explain(fn: Callable[..., Any], *args: Any) -> Any:
    try:
        return fn(*args)
    except Exception as error:
        from functrain.compiler import untraceable

        reading = untraceable.reading(error)
        if reading:
            # the way to the user's line, and not the page between it and here
            raise TypeError(f"ft.compile: {reading}").with_traceback(untraceable.users_own(error)) from None
        if no_compiler(error):
            raise CompilerNotFoundError from error
        raise
