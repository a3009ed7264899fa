"""What is drawn from a key is drawn again in the backward pass, not kept for it.

The mask of a dropout is a hash of a counter and a key: computing it again takes about as long as reading it
back from memory, and no memory. torch's partitioner counts operations and keeps the mask, a byte an element; one graph
of both passes, which nobody partitions, keeps the two words it was made of, eight bytes. Here a tensor is *drawn* when
it is computed elementwise from the hash, which is of counters, numbers and tensors far smaller than itself, such as a
key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

from functrain.random.hashing import WORD

aten = torch.ops.aten

_MADE = {aten.arange.default, aten.arange.start, aten.arange.start_step, aten.full.default, aten.full_like.default,
         torch.ops.prims.iota.default}  # fmt: skip
_VIEWS = {aten.as_strided.default, aten.view.default, aten.reshape.default, aten._unsafe_view.default,
          aten.expand.default, aten.unsqueeze.default, aten.alias.default, aten.detach.default,
          torch.ops.prims.convert_element_type.default, aten._to_copy.default}  # fmt: skip
_SMALL = 2**12  # elements: keeping these costs nothing, and code to compute them again takes time to compile
_SMALLER = 64  # what a tensor may be drawn from: one this many times smaller


def mark(graph: fx.Graph) -> None:
    """Tell torch's partitioner to compute what is drawn again in the backward graph."""
    for node in _drawn(graph):
        if _size(node) > _SMALL:
            node.meta.setdefault("recompute", CheckpointPolicy.MUST_RECOMPUTE)  # where nobody has decided


def draw_again(graph: fx.Graph, splits: Callable[[fx.Node], bool]) -> None:
    """Draw anew for readers that an operation which `splits` the graph separates from earlier ones: no loop of theirs
    can be one, so that what they share would be kept in between."""
    drawn = _drawn(graph)
    section = 0
    first: dict[fx.Node, int] = {}
    again: dict[tuple[fx.Node, int], fx.Node] = {}

    def copied(node: fx.Node) -> fx.Node:
        if node not in drawn or _size(node) <= _SMALL:
            return node
        if (node, section) not in again:
            again[node, section] = graph.node_copy(node, copied)
            again[node, section].meta["drawn again"] = True
        return again[node, section]

    for node in list(graph.nodes):
        section += splits(node)
        if node in drawn or node.op != "call_function":
            continue
        for value in node.all_input_nodes:
            if value in drawn and first.setdefault(value, section) != section:
                with graph.inserting_before(node):
                    node.replace_input_with(value, copied(value))


def _drawn(graph: fx.Graph) -> dict[fx.Node, None]:
    drawn: dict[fx.Node, None] = {}
    for node in graph.nodes:
        size = _size(node)
        inputs = [value for value in node.all_input_nodes if value not in drawn]
        if size and _elementwise(node.target) and all(0 < _size(value) * _SMALLER <= size for value in inputs):
            drawn[node] = None
    # of what is no draw, such as the angles of positions, layers share one, whoever computes it again
    draws: set[fx.Node] = set()
    for node in drawn:
        if node.target is WORD or any(value in draws for value in node.all_input_nodes):
            draws.add(node)
    for node in reversed(drawn):  # and the counters that go into them
        if any(user in draws for user in node.users):
            draws.add(node)
    return {node: None for node in drawn if node in draws}


def _elementwise(target: Any) -> bool:
    if target in _MADE or target in _VIEWS:
        return True
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    if target.namespace == "prims":  # which have no tags, but the names of what they are parts of
        packet = getattr(aten, target._schema.name.removeprefix("prims::"), None)
        return packet is not None and torch.Tag.pointwise in getattr(packet, packet.overloads()[0]).tags
    return torch.Tag.pointwise in target.tags and torch.Tag.nondeterministic_seeded not in target.tags


def _size(node: fx.Node) -> int:
    value = node.meta.get("val")
    size = value.numel() if isinstance(value, Tensor) else 0
    return size if isinstance(size, int) else 0  # a length that is not known yet is in no graph of a loss
