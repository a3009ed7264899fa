"""From a traced graph to a list of calls.

The graph is cut at its opaque operations. What lies between two of them is a program of its own, see `segments`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from functrain.compiler import graph_passes, leafwise, picking, redrawing, segments
from functrain.compiler.adding import Chain, additions, with_chains
from functrain.compiler.cutting import Cutter
from functrain.compiler.inductor import lowering
from functrain.compiler.listing import Listing
from functrain.compiler.parts import BACKWARD, CALL, FORWARD, ZEROS, Layer, Loss, zeros_like
from functrain.compiler.segments import extract, is_cut, is_small_talk, levels_of, results_of, size
from functrain.compiler.tracing import Traced, base_of

aten = torch.ops.aten
_MANY_PRODUCTS = 12  # outside of layers: then what is kept of them is worth a partitioner's thought
_MANY_LEAVES = 16  # a kernel for each takes g++ as long as the shared one and its caller
_LARGE = 2**20  # bytes


class Linker:
    """Compiles graphs and the parts that they call, each thing once."""

    def __init__(self, cutter: Cutter, programs: dict[Any, Any] | None = None) -> None:
        self.cutter = cutter
        self.programs: dict[Any, Any] = {} if programs is None else programs  # by what they do
        self._linked: dict[int, Any] = {}  # the same, by the number of a part
        self._keys: dict[int, Any] = {}  # what each part does, told before its graph is taken apart

    def link(self, traced: Traced) -> lowering.Kernel:
        """Compile a whole function, for its tensors and then those that it has lifted."""
        graph = traced.graph
        picking.by_comparison(graph)
        lowering.eliminate_dead(graph)
        if not is_cut(graph):
            large = sum(node.meta["val"].nbytes for node in traced.inputs) >= _LARGE
            products = any(graph_passes.is_product(node) for node in graph.nodes)
            return self._segment(graph, traced.mode, leaf_by_leaf=large and not products)
        return self._cut(graph, traced.mode, traced.inputs, results_of(graph), update=True)

    def _part(self, number: int) -> lowering.Kernel:
        if number not in self._linked:
            part: Any = self.cutter.parts[number]
            key = self._key(number)
            if key not in self.programs:
                self.programs[key] = self._loss(part) if isinstance(part, Loss) else _CompiledLayer(part)
            self._linked[number] = self.programs[key]
        return self._linked[number]

    def _key(self, number: int) -> Any:
        """Two parts of one key do the same."""
        if number not in self._keys:
            self._keys[number] = self._key_of(self.cutter.parts[number])
        return self._keys[number]

    def _key_of(self, part: Any) -> Any:
        if isinstance(part, Loss):
            options = (
                part.results, tuple(part.written.items()), tuple(part.lasting), part.lean, tuple(part.traced.budgets),
            )  # fmt: skip
            return ("loss", options, self._signature(part.traced.graph))
        graphs = [m if m is None else self._signature(m.graph) for m in (part.forward, part.backward)]
        return ("layer", part.results, tuple(part.kept), tuple(part.given), *graphs)

    def _signature(self, graph: fx.Graph) -> str:
        """Two graphs of one signature do the same."""
        names: dict[Any, Any] = {node: graph_passes.Name(f"n{i}") for i, node in enumerate(graph.nodes)}
        lines = []
        for node in graph.nodes:
            value = node.meta.get("val")
            kind = (value.shape, value.stride(), value.dtype, value.device) if isinstance(value, Tensor) else ()
            args: Any = fx.node.map_arg((node.args, node.kwargs), names.get)
            if node.target in (FORWARD, BACKWARD, CALL):
                args = (self._key(node.args[0]), args[0][1:])
            elif node.target is ZEROS:
                args = args[0][1:]
            tag = node.meta.get("recompute")
            lines.append((str(node.target) if node.op == "call_function" else node.op, args, kind, tag and tag.name))
        return hashlib.sha256(repr(lines).encode()).hexdigest()

    def _loss(self, part: Loss) -> lowering.Kernel:
        graph, mode, inputs = part.traced.graph, part.traced.mode, part.traced.inputs
        end: Any = graph.output_node()
        end.args = (tuple(node for i, node in enumerate(end.args[0]) if i not in part.written),)
        picking.by_comparison(graph)
        lowering.eliminate_dead(graph)
        own: list[Hashable] = list(end.args[0])
        tagged = bool(part.traced.budgets) or any("recompute" in node.meta for node in graph.nodes)
        products = sum(graph_passes.is_product(node) for node in graph.nodes)
        listing = Listing(inputs)
        if not part.traced.tangents or (is_cut(graph) and not tagged and products < _MANY_PRODUCTS):
            _fill(part.traced.tangents, 1.0)
            kernel = self._cut(graph, mode, inputs, end.args[0]) if is_cut(graph) else self._segment(graph, mode)
            if not part.written:
                return kernel
            listing.add("forward and backward", kernel, inputs, own)
        else:
            own = self._two(part, listing)
        found, written = iter(own), part.written
        places = range(len(own) + len(written))
        return listing.finish([inputs[written[i]] if i in written else next(found) for i in places])

    def _two(self, part: Loss, listing: Listing) -> list[Hashable]:
        """Add a forward and a backward program; return the names of what they return."""
        traced, count = part.traced, part.results
        budget = min(traced.budgets, default=1.0)
        forward, backward = lowering.partition(
            traced.graph, traced.mode, count, lasting=part.lasting, lean=part.lean, budget=budget
        )
        by_name = {node.name: node for node in traced.inputs}
        given = [by_name[node.name] for node in forward.graph.find_nodes(op="placeholder")]
        passed = lowering.pass_inputs_by(forward, count)
        graph_passes.write_early(backward.graph)
        if is_cut(forward.graph) or is_cut(backward.graph):
            first = self._whole(forward.graph, traced.mode)
            second = self._whole(backward.graph, traced.mode)
        else:
            own = _its_own(forward.graph, count, passed)
            first, strides = lowering.lower(forward, traced.mode, "forward", visible=count)
            lowering.lay_out(backward, [None if of_input else strides[i] for of_input, i in passed])
            second, _ = lowering.lower(backward, traced.mode, "backward", given=own)
        made: list[Hashable] = [object() for _ in results_of(forward.graph)]
        grads: list[Hashable] = [object() for _ in results_of(backward.graph)]
        kept_bytes = _bytes_of_its_own(results_of(forward.graph)[count:])
        listing.add("forward", first, given, made, size(forward.graph), kept_bytes)
        ones = [listing.constant(_ones(node)) for node in traced.tangents]
        saved = [given[i] if of_input else made[i] for of_input, i in passed]
        listing.add("backward", second, [*saved, *ones], grads, size(backward.graph))
        return [*made[:count], *grads]

    def _whole(self, graph: fx.Graph, mode: Any) -> lowering.Kernel:
        inputs = graph.find_nodes(op="placeholder")
        if not is_cut(graph):
            return self._segment(graph, mode)
        return self._cut(graph, mode, inputs, results_of(graph))

    def _cut(
        self, graph: fx.Graph, mode: Any, inputs: Sequence[fx.Node], results: Sequence[Any], *, update: bool = False
    ) -> Listing:
        """Make the list of a graph with calls; with `update`, what comes after the last is compiled leaf by leaf."""
        listing = Listing(inputs)
        redrawing.draw_again(graph, segments.is_call)  # no mask waits for the backward pass
        inside = additions(graph)
        chained = {node for chains in inside.values() for chain in chains.values() for node in chain.nodes}
        calls, levels = levels_of(graph)
        between: dict[int, list[fx.Node]] = {}
        for node in graph.nodes:
            if node in levels and node not in chained:
                between.setdefault(levels[node], []).append(node)
        for level in range(len(calls) + 1):
            if level:
                self._add_call(listing, calls[level - 1], inside.get(calls[level - 1], {}))
            if level in between:
                last = update and level == len(calls)
                self._add_segment(listing, between[level], mode, leaf_by_leaf=last)
        return listing.finish([r if isinstance(r, fx.Node) else listing.constant(r) for r in results])

    def _add_call(self, listing: Listing, call: Any, inside: dict[int, Chain]) -> None:
        items = {user.args[1]: user for user in call.users}
        if call.target is ZEROS:
            _, like, as_float32 = call.args
            listing.add("zeros", _zeros(as_float32), like, [items.get(i) for i in range(len(like))])
            return
        if segments.runs_as_it_is(call.target):
            given = call.all_input_nodes
            count = max(items, default=-1) + 1
            listing.add(str(call.target), _as_it_is(call, count), given, [items.get(i) for i in range(count)])
            return
        number, given = call.args
        part: Any = self._part(number)
        if call.target is CALL:
            count = len(self.cutter.parts[number].traced.results)  # type: ignore[attr-defined]
            listing.add("loss", part, given, [items.get(i) for i in range(count)])
        elif call.target is FORWARD:
            made = results_of(part.part.forward.graph)
            kept_bytes = _bytes_of_its_own(made[part.part.results :])
            made = [items.get(i) for i in range(len(made))]
            listing.add("layer forward", part.forward, given, made, size(part.part.forward.graph), kept_bytes)
        else:
            program, extra = part.backward(inside, given)
            made = [None if i in inside else items.get(i) for i in range(len(part.part.given))]
            listing.add("layer backward", program, [*given, *extra], made, size(part.part.backward.graph))

    def _add_segment(self, listing: Listing, nodes: list[fx.Node], mode: Any, *, leaf_by_leaf: bool) -> None:
        small = is_small_talk(nodes)
        graph, given, made = (
            segments.take(nodes) if leaf_by_leaf and not small else extract(nodes)
        )  # nothing comes after it
        if small:
            module = fx.GraphModule({}, graph)
            listing.add("operations", lambda values: module(*values), given, made, len(nodes))
            return
        name = "update" if leaf_by_leaf else "segment"
        listing.add(name, self._segment(graph, mode, leaf_by_leaf=leaf_by_leaf), given, made, len(nodes))

    def _segment(self, graph: fx.Graph, mode: Any, *, leaf_by_leaf: bool = False) -> lowering.Kernel:
        """Compile operations without calls among them; what has many leaves, without a kernel for each."""
        key = (leaf_by_leaf, self._signature(graph))
        if key not in self.programs:
            inputs = graph.find_nodes(op="placeholder")
            on_cpu = all(node.meta["val"].device.type == "cpu" for node in inputs)
            # a GPU kernel over many leaves compiles as fast as one over a single leaf, and costs one launch
            if leaf_by_leaf and on_cpu and len(inputs) >= _MANY_LEAVES:
                self.programs[key] = leafwise.compile_graph(graph, mode)
            else:
                graph_passes.write_early(graph)
                self.programs[key] = lowering.compile_graph(graph, mode)
        return self.programs[key]


class _CompiledLayer:
    """The programs of one kind of layers."""

    def __init__(self, part: Layer) -> None:
        self.part = part
        self._own = _its_own(part.forward.graph, part.results, part.kept)
        which = "inference" if part.backward is None else "forward"
        self.forward, strides = lowering.lower(part.forward, part.mode, which, visible=part.results)
        if part.backward is not None:
            lowering.lay_out(part.backward, [None if of_input else strides[i] for of_input, i in part.kept])
        self._programs: dict[Any, lowering.Kernel] = {}

    def backward(self, inside: dict[int, Chain], given: Sequence[fx.Node]) -> tuple[lowering.Kernel, list[fx.Node]]:
        """Return the backward program that does what `inside` says with its results, and what else it is given."""
        assert self.part.backward is not None
        once = all(len(given[i].users) == 1 for i in self._own)  # nobody differentiates the same call again
        key = (once, *[(i, chain.key) for i, chain in sorted(inside.items())])
        if key not in self._programs:
            module = with_chains(self.part.backward, inside) if inside else self.part.backward
            own = self._own if once else []
            self._programs[key], _ = lowering.lower(module, self.part.mode, "backward", given=own)
        return self._programs[key], [node for _, chain in sorted(inside.items()) for node in chain.others]


def _bytes_of_its_own(nodes: Sequence[fx.Node]) -> int:
    """Return the bytes of values that are no views of inputs, each memory once."""
    bases = dict.fromkeys(base_of(node) for node in nodes)
    return sum(node.meta["val"].nbytes for node in bases if node.op != "placeholder")


def _its_own(forward: fx.Graph, results: int, kept: Sequence[tuple[bool, int]]) -> list[int]:
    """Return which values that are kept for the backward program lie in memory where nothing else does."""
    bases = [base_of(node) if isinstance(node, fx.Node) else None for node in results_of(forward)]
    returned, given = Counter(bases), Counter(kept)
    own = {i for i, base in enumerate(bases) if base and base.op != "placeholder" and returned[base] == 1}
    return [
        place for place, (of_input, i) in enumerate(kept)
        if not of_input and i >= results and i in own and given[False, i] == 1
    ]  # fmt: skip


def _fill(placeholders: Sequence[fx.Node], number: float) -> None:
    """Put a constant in the place of inputs."""
    for node in placeholders:
        graph, value = node.graph, node.meta["val"]
        options = {"dtype": value.dtype, "device": value.device}
        with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
            full = graph.call_function(aten.full.default, (list(value.shape), number), options)
        full.meta["val"] = value
        node.replace_all_uses_with(full)
        graph.erase_node(node)


def _ones(node: fx.Node) -> Tensor:
    value = node.meta["val"]
    return torch.ones(value.shape, dtype=value.dtype, device=value.device)


def _as_it_is(call: fx.Node, count: int) -> lowering.Kernel:
    """Return a program that does one operation, and returns the first of its results."""
    target: Any = call.target
    given = call.args, call.kwargs  # as they are: the graph is not there any more when it runs
    places = {node: i for i, node in enumerate(call.all_input_nodes)}

    def run(values: list[Any]) -> list[Any]:
        args, kwargs = fx.node.map_arg(given, lambda node: values[places[node]])
        values.clear()
        with torch.enable_grad():  # or the forward operation keeps nothing for the backward one
            return list(target(*args, **kwargs)[:count])

    return run


def _zeros(as_float32: Sequence[bool]) -> lowering.Kernel:
    def run(values: list[Tensor]) -> list[Tensor]:
        made = zeros_like(values, as_float32)
        values.clear()
        return made

    return run
