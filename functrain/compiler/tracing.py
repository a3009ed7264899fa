"""A function's operations, seen by running it once on tensors without data.

Three layers see each operation, from above: autograd and the transforms of torch.func, as in eager; `Functional`,
which turns writes into new values; `Recording`, which makes a node of it and finds shapes. What an operation meets that
was made outside of the trace, a tensor of the caller's or of a trace around this one, becomes one more input.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from functrain.compiler import engine, kinds
from functrain.compiler.functional import Functional
from functrain.compiler.graph_passes import is_view
from functrain.compiler.inductor.decompositions import decompositions
from functrain.compiler.recording import Recording, Writes
from functrain.compiler.untraceable import closure_written
from functrain.tree import by_kind

aten = torch.ops.aten


class Traced(NamedTuple):
    """A graph without side effects but `copy_` to inputs, at its end, and its surroundings."""

    graph: fx.Graph
    mode: Recording
    inputs: list[fx.Node]  # as many as tensors were given, and those of `lifted`
    lifted: list[Tensor]  # tensors from outside that the function used
    results: list[Any]  # what the function returned, nodes in place of tensors
    tangents: list[fx.Node]  # inputs that the caller did not give: the cotangents of what is differentiated
    budgets: list[float]  # parts of the memory that `recompute` inside asked to keep


def trace(
    fn: Callable[..., Any], tensors: Sequence[Tensor], *, around: Sequence[Recording] = (), decompose: bool = True
) -> Traced:
    """Run `fn(recording, *tensors)`, which returns `(results, writes)`: values, and pairs of an argument and the value
    that it is to hold afterwards. With `decompose`, operations are those that torch's compiler takes. `around` are the
    traces that go on.

    A function that writes into memory that several tensors share is run once more, through `Functional`, which takes
    three times as long.
    """
    made = decompositions() if decompose else {}
    try:
        return _traced(fn, tensors, Recording(made, around), functional=False)
    except Writes:
        with engine.entered(again=True):
            return _traced(fn, tensors, Recording(made, around), functional=True)


def _traced(fn: Callable[..., Any], tensors: Sequence[Tensor], mode: Recording, *, functional: bool) -> Traced:
    with _apart(), ExitStack() as stack:
        if functional:
            # C++ would turn writes into values for itself, above our layer
            above = torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize))
            stack.enter_context(above)
        stack.enter_context(mode)
        values = [mode.new(x) for x in tensors]
        mode.inputs = [mode.input(f"primals_{i + 1}", fake) for i, fake in enumerate(values)]
        if functional:
            mode.functional = stack.enter_context(Functional(mode))
            values = [mode.functional.wrapped(fake) for fake in values]
        stack.enter_context(by_kind.recorded_by(None if functional else kinds.recorder(mode)))
        results, writes = fn(mode, *values)
        nodes = [mode.node_of(r) if isinstance(r, Tensor) else r for r in results]
        pairs: list[tuple[fx.Node, fx.Node]] = []
        if mode.functional is not None:
            pairs += [(mode.inputs[i], mode.node_of(x)) for i, x in enumerate(values) if _written(x)]
            if any(_written(x) for x in mode.functional.twins.values()):
                raise closure_written()
        pairs += [(mode.node_of(old), mode.node_of(new)) for old, new in writes]
    mode.recording = False
    _write(mode.graph, nodes, pairs, mode.aliases)
    mode.graph.output(tuple(nodes))
    return Traced(mode.graph, mode, mode.inputs, mode.lifted, nodes, mode.tangents, mode.budgets)


@contextmanager
def _apart() -> Iterator[None]:
    """Leave the trace that is going on."""
    with torch._guards.tracing(None), _disable_current_modes():
        yield


def _written(x: Any) -> bool:
    return torch._functionalize_has_data_mutation(x.elem)  # type: ignore[attr-defined]


def _write(
    graph: fx.Graph, results: list[Any], pairs: Sequence[tuple[fx.Node, fx.Node]], aliases: dict[fx.Node, fx.Node]
) -> None:
    """Add writes to inputs, each of the value that its source has before any of them."""
    targets = {old for old, new in pairs if old is not new}
    copies: dict[fx.Node, fx.Node] = {}

    def before(node: Any) -> Any:
        if not isinstance(node, fx.Node) or base_of(node, aliases) not in targets:
            return node
        if node not in copies:
            copies[node] = graph.call_function(COPIED, (node,))
            copies[node].meta["val"] = node.meta["val"]
        return copies[node]

    sources = [(old, before(new)) for old, new in pairs if old is not new]
    results[:] = [before(node) for node in results]
    for old, new in sources:
        graph.call_function(aten.copy_.default, (old, new)).meta.update(val=old.meta["val"], partitioner_tag=_BACKWARD)


# torch's compiler takes a clone for nothing, and reads what is overwritten
_library = torch.library.Library("functrain", "FRAGMENT")
_library.define("copied(Tensor tensor) -> Tensor")
_library.impl("copied", torch.clone, "CompositeExplicitAutograd")
torch.library.register_fake("functrain::copied", torch.empty_like, lib=_library)
COPIED = torch.ops.functrain.copied.default
_BACKWARD = "must_be_in_backward"  # to torch's partitioner, which would leave out a write that nobody reads


def base_of(node: fx.Node, aliases: dict[fx.Node, fx.Node] | None = None) -> fx.Node:
    """Follow views, and what opaque operations return of their arguments, to the value that has the memory."""
    while True:
        if aliases is not None and node in aliases:
            node = aliases[node]
        elif is_view(node.target):
            node = node.all_input_nodes[0]
        elif node.target is operator.getitem and is_view(node.all_input_nodes[0].target):
            node = node.all_input_nodes[0].all_input_nodes[0]  # one of the parts of a split
        else:
            return node
