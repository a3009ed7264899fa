"""Where a traced function is cut: layers of `nn.stack`, and gradients.

While a function is traced, a layer is one opaque operation each way, `forward` and `backward`, and a gradient one
`call`. What is in them is traced apart, once for all layers that are alike (`parts`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import CheckpointPolicy

from functrain import tree
from functrain.compiler import engine
from functrain.compiler.arguments import same_value
from functrain.compiler.inductor import lowering
from functrain.compiler.parts import CALL, ZEROS, Layer, LayerCall, Loss, Part, differentiated, numbers
from functrain.compiler.recording import Recomputed, Recording
from functrain.compiler.tracing import COPIED, Traced, base_of, trace
from functrain.compiler.untraceable import Untraceable

aten = torch.ops.aten


class Cutter:
    """What one compilation has cut."""

    def __init__(self, *, layers: bool) -> None:
        self.layers = layers  # cut layers, and gradients wherever they are taken; else those alone that repeat
        self.parts: dict[int, Part] = {}
        self._known: dict[Any, tuple[Part, Any]] = {}  # with what the key says the address of
        self._in_layer = False
        self._recordings: list[Recording] = []  # the traces that go on, the innermost last

    def trace(self, fn: Callable[..., Any], tensors: Sequence[Tensor]) -> Traced:
        """Run `fn(*tensors)` as `tracing.trace` does, so that what it calls finds this cutter."""

        known = dict(self._known)

        def recorded(mode: Recording, *values: Tensor) -> Any:
            self._known = dict(known)  # what a trace that was broken off has found belongs to it
            self._recordings.append(mode)
            try:
                return fn(*values)
            finally:
                self._recordings.pop()

        return trace(recorded, tensors, around=tuple(self._recordings))

    def zeros(self, tensors: list[Tensor], as_float32: list[bool]) -> list[Tensor]:
        """Return zeros like the tensors, some in float32, in memory of their own that parts may write to."""
        return list(ZEROS(next(numbers), tensors, as_float32))

    def tangent(self, value: Tensor) -> Tensor:
        """Return the cotangent by which the value is differentiated."""
        return self._mode().tangent(value)

    def partitions(self) -> bool:
        """Tell whether what runs goes through torch's partitioner, and not through a transform of torch.func first."""
        return bool(self._recordings) and self._recordings[-1].joint and not _transformed()

    @contextmanager
    def recomputing(self, operations: Collection[Any], names: Sequence[str]) -> Iterator[None]:
        """Let the backward pass compute again what is computed inside, but for results of `operations` and values that
        `name_value` gives one of the names."""
        mode = self._mode()
        mode.recomputed.append(Recomputed(next(numbers) + 1, operations, names))
        try:
            yield
        finally:
            mode.recomputed.pop()

    def keep_part(self, part: float) -> None:
        """Let the backward pass compute again all but a part of the memory."""
        self._mode().budgets.append(part)

    def name_value(self, x: Tensor, name: str) -> None:
        """Keep a value if all functions that are recomputed around it name it."""
        mode = self._mode()
        if mode.recomputed and all(name in r.names for r in mode.recomputed):
            mode.node_of(x).meta["recompute"] = CheckpointPolicy.MUST_SAVE

    def _mode(self) -> Recording:
        return self._recordings[-1]

    def _lasting(self, inputs: Sequence[Tensor]) -> list[int]:
        mode = self._mode()
        return [i for i, x in enumerate(inputs) if mode.node_of(x).op == "placeholder"]

    def cuts_layers(self) -> bool:
        """Tell whether `nn.stack` is to hand over its layers: not those within another layer, or within a transform."""
        return self.layers and not self._in_layer and not _transformed()

    def cuts_losses(self) -> bool:
        return (self.layers or engine.here.repeats) and not self._in_layer

    def layer(self, kind: Any, block: Callable[..., Any], layer: Any, x: Any, args: tuple[Any, ...]) -> Any:
        """Record one call of `block(layer, x, *args)`, whose result is a tree like x."""
        inputs = (layer, x, args)
        leaves, structure = tree.flatten(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        wanted = differentiated(tensors, x)
        key = ("layer", kind, _settings(), structure, *[_kind(leaf) for leaf in leaves], *wanted)
        if key not in self._known:
            self._known[key] = self._traced_layer(block, leaves, structure, tensors, wanted), (kind, block)
        part = self._known[key][0]
        found = iter(LayerCall.apply(part, *tensors, *part.lifted))
        return tree.unflatten(part.structure, [next(found) if v is None else v for v in part.values])

    def _traced_layer(
        self, block: Callable[..., Any], leaves: list[Any], structure: Any, tensors: list[Tensor], wanted: list[int]
    ) -> Layer:
        part = Layer()

        def joint(*values: Tensor) -> Any:
            mode = self._mode()
            mode.joint = bool(wanted)
            inputs = [engine.start_of_gradient(v, i in wanted) for i, v in enumerate(values)]
            with torch.enable_grad():
                layer, x, args = tree.unflatten(structure, _filled(leaves, inputs))
                made = block(layer, x, *args)
            part.structure = _check_like("nn.stack", x, made)
            results = [leaf for leaf in tree.leaves(made) if isinstance(leaf, Tensor)]
            part.values = [None if isinstance(leaf, Tensor) else leaf for leaf in tree.leaves(made)]
            part.differentiable = [i for i, r in enumerate(results) if r.requires_grad]
            outer = [x for x in mode.lifted if x.requires_grad]
            chosen = [*[inputs[i] for i in wanted], *outer]
            part.results = len(results)
            if not part.differentiable or not chosen:
                part.differentiable, part.given = [], []
                return [r.detach() for r in results], []
            cotangents = [self.tangent(results[i]) for i in part.differentiable]
            part.strides = [x.stride() for x in cotangents]
            grads = torch.autograd.grad(
                [results[i] for i in part.differentiable], chosen, cotangents, allow_unused=True
            )
            places = [*wanted, *[len(tensors) + i for i, x in enumerate(mode.lifted) if x.requires_grad]]
            part.given = [place for place, grad in zip(places, grads, strict=True) if grad is not None]
            return [*[r.detach() for r in results], *[grad for grad in grads if grad is not None]], []

        before, self._in_layer = self._in_layer, True
        try:
            traced = self.trace(joint, tensors)
        finally:
            self._in_layer = before
        if any(node.target is aten.copy_.default for node in traced.graph.nodes):
            raise Untraceable(
                "nn.stack: a block writes into a tensor that it was given, which other layers read too; compute a new "
                "one, as in x = x + 1 for x += 1"
            )
        part.lifted, part.mode = traced.lifted, traced.mode
        part.lasting = self._lasting([*tensors, *part.lifted])
        _own_results(traced.graph)
        lean = engine.here.lean
        if not part.given:
            part.forward = fx.GraphModule({}, traced.graph)
            part.kept = []
        else:
            budget = min(traced.budgets, default=1.0)
            part.forward, part.backward = lowering.partition(
                traced.graph, traced.mode, part.results, lasting=part.lasting, lean=lean, budget=budget
            )
            part.kept = lowering.pass_inputs_by(part.forward, part.results)
        self.parts[part.number] = part
        return part

    def call(
        self,
        owner: Any,
        run: Callable[..., Any],
        inputs: Any,
        written: Callable[[Any, Any], list[tuple[Tensor, Tensor]]] = lambda inputs, result: [],
        first: Callable[[Any], Any] = lambda result: result,
    ) -> Any:
        """Record one call of `run(*inputs)`, a tree, whose part `first` is there before its gradient is.

        `written` gives pairs of an input and the result that is to lie in its memory. With `engine.here.repeats` what
        has been traced for `owner` and inputs of the same kinds stands for this call, too.
        """
        leaves, structure = tree.flatten(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key: Any = ("call", id(owner), _settings(), structure, *[_kind(leaf) for leaf in leaves])
        key = (*key, *[x.requires_grad for x in tensors])
        if engine.here.repeats and _hashable(key) and key in self._known:
            part: Any = self._known[key][0]
        else:
            part = self._traced_call(run, leaves, structure, tensors, written, first)
            # what a part takes of the trace around it may be another value at the next call
            if _hashable(key) and not any(isinstance(x, (FakeTensor, FunctionalTensor)) for x in part.lifted):
                self._known[key] = part, owner
        given = [*tensors, *part.lifted]
        results = list(CALL(part.number, given))
        mode = self._mode()
        for i, j in part.aliases.items():
            mode.aliases[mode.node_of(results[i])] = mode.node_of(given[j])
        found = iter(results)
        return tree.unflatten(part.structure, [next(found) if v is None else v for v in part.values])

    def _traced_call(
        self, run: Any, leaves: list[Any], structure: Any, tensors: list[Tensor], written: Any, first: Any
    ) -> Loss:
        part = Loss()

        def flat(*values: Tensor) -> Any:
            self._mode().joint = True
            inputs = tree.unflatten(structure, _filled(leaves, values))
            result = run(*inputs)
            found, part.structure = tree.flatten(result)
            part.results = sum(isinstance(leaf, Tensor) for leaf in tree.leaves(first(result)))
            part.values = [None if isinstance(leaf, Tensor) else leaf for leaf in found]
            pairs = written(inputs, result)
            results = [leaf for leaf in found if isinstance(leaf, Tensor)]
            places = {id(x): i for i, x in enumerate(results)}
            inputs_at = {id(x): i for i, x in enumerate(values)}
            part.written = {places[id(new)]: inputs_at[id(old)] for old, new in pairs}
            return results, pairs

        with engine.entered(repeats=False):
            part.traced = self.trace(flat, tensors)
        targets = {node.args[0] for node in part.traced.graph.nodes if node.target is aten.copy_.default}
        if targets != {part.traced.inputs[i] for i in part.written.values()} & targets:
            raise Untraceable(
                "a function writes into an argument while it is differentiated; return the new value, as "
                "in x = x + 1 for x += 1"
            )
        part.lifted, part.lean = part.traced.lifted, engine.here.lean
        part.lasting = self._lasting([*tensors, *part.lifted])
        end: Any = part.traced.graph.output_node()
        bases = [base_of(node, part.traced.mode.aliases) for node in end.args[0]]
        places_of = {node: i for i, node in enumerate(part.traced.inputs)}
        part.aliases = {i: places_of[node] for i, node in enumerate(bases) if node in places_of}
        self.parts[part.number] = part
        return part


def _transformed() -> bool:
    return engine.here.depth > 1 or torch._C._functorch.peek_interpreter_stack() is not None


def _filled(leaves: list[Any], tensors: Sequence[Tensor]) -> list[Any]:
    new = iter(tensors)
    return [next(new) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _own_results(graph: fx.Graph) -> None:
    """Let no result lie in the memory of an input, which whoever calls the layer may overwrite."""
    end: Any = graph.output_node()
    results, seen = list(end.args[0]), set[fx.Node]()
    for i, node in enumerate(results):
        if node in seen or base_of(node).op == "placeholder":
            with graph.inserting_before(end):
                results[i] = graph.call_function(COPIED, (node,))
            value = node.meta["val"]
            with _disable_current_modes(), value.fake_mode:
                results[i].meta["val"] = torch.empty_like(value)
        seen.add(node)
    end.args = (tuple(results),)


def _check_like(what: str, x: Any, made: Any) -> Any:
    structure = tree.structure(made)
    if structure != tree.structure(x):
        expected, came = [[path for path, _ in tree.items(value)] for value in (x, made)]
        raise TypeError(
            f"{what}: expected a block that returns a tree like x, {expected}, came {came}; begin with an x that has "
            "all that the block returns"
        )
    return structure


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
    return same_value(leaf)


def _settings() -> Any:
    return (
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
        torch.is_autocast_enabled() and torch.get_autocast_dtype("cuda"),
        torch.is_grad_enabled(),
    )


def _hashable(key: Any) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True
