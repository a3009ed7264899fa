"""The columns of a graph: the operations on one leaf that need no other, found in the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

_REDUCTIONS = {aten.sum.default, aten.any.default, aten.all.default, aten.amax.default, aten.amin.default,
               aten.max.default, aten.min.default, aten.mean.default, aten.prod.default}  # fmt: skip
_FILLS = {aten.full_like.default, aten.zeros_like.default, aten.ones_like.default, aten.empty_like.default}
_CASTS = {aten._to_copy.default, aten.clone.default, aten.detach.default, aten.alias.default, aten.copy.default}


def columns(nodes: list[fx.Node]) -> dict[fx.Node, int]:
    """Return the column of every node that belongs to one: the leaf's values, and their reductions to a number."""
    parent = {node: node for node in nodes}

    def root(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            node = parent[node]
        return node

    opaque: set[fx.Node] = {node for node in nodes if node.op != "output" and not is_scalar(node) and not _fits(node)}
    for node in nodes:
        shaped = [arg for arg in node.all_input_nodes if not is_scalar(arg)]
        if node.op == "output" or not shaped:
            continue
        for other in [*shaped, node]:
            parent[root(other)] = root(shaped[0])
        shapes: set[Any] = {value_of(arg).shape for arg in shaped}
        if not _is_reduction(node):
            shapes.add(getattr(value_of(node), "shape", None))  # several results, as unbind's, have none
        if len(shapes) != 1 or not (_is_reduction(node) or _is_pointwise(node)):
            opaque.add(node)
    opaque_roots = {root(node) for node in opaque}
    has_leaf = {root(node) for node in nodes if node.op == "placeholder" and not is_scalar(node)}
    number = {node: i for i, node in enumerate(nodes)}
    kept = [n for n in nodes if n.op != "output" and root(n) in has_leaf and root(n) not in opaque_roots]
    return {node: number[root(node)] for node in kept}


def value_of(node: fx.Node) -> Tensor:
    return node.meta["val"]


def is_scalar(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, Tensor) or value.dim() == 0


def _is_reduction(node: fx.Node) -> bool:
    return node.target in _REDUCTIONS and len(node.args) == 1 and is_scalar(node)


def _is_pointwise(node: fx.Node) -> bool:
    if node.target in _FILLS | _CASTS or node.target is aten.copy_.default:
        return True
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _fits(node: fx.Node) -> bool:
    """Tell whether the leaf can be seen as one dimension: dense in order, and longer than 1, which is special-cased."""
    value = value_of(node)
    if value.dtype == torch.float64:
        return False  # torch 2.13 takes a () float64 input of a graph of any length for a Python number, and gives up
    if node.op == "call_function" and not any(not is_scalar(arg) for arg in node.all_input_nodes):
        return False  # made from nothing, with its shape written into the call
    return value.numel() > 1 and value.is_contiguous()
