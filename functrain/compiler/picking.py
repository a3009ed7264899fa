"""The gradient of what picks one entry of each row, such as the logit of a label, by comparison.

Autograd scatters it into zeros, a tensor as large as the logits, which no other kernel can make on its way: beside the
logits and their gradient, half of a classifier's peak.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
_ZEROS = {aten.new_zeros.default, aten.zeros.default, aten.zeros_like.default}


def by_comparison(graph: fx.Graph) -> None:
    """Turn an addition to zeros, at a place of each row, into a comparison of all places with that one.

    Where a `gather` reads by the same places: it says which of them are outside.
    """
    picked = {(node.args[2], _dim(node)) for node in graph.find_nodes(op="call_function", target=aten.gather.default)}
    for node in list(graph.find_nodes(op="call_function", target=aten.scatter_add.default)):
        zeros, _, index, source = node.args
        dim, value, places = _dim(node), node.meta["val"], index.meta["val"]
        expected = (*value.shape[:dim], 1, *value.shape[dim + 1 :])
        if (index, dim) not in picked or not _is_zero(zeros):
            continue
        if places.shape != expected or source.meta["val"].shape != expected:
            continue
        with graph.inserting_before(node), value.fake_mode:
            count = value.shape[dim]
            options = {"dtype": torch.int64, "device": value.device, "requires_grad": False}
            numbers = _call(graph, torch.ops.prims.iota.default, (count,), {"start": 0, "step": 1, **options})
            along = _call(graph, aten.view.default, (numbers, [count, *[1] * (value.dim() - dim - 1)]))
            here = _call(graph, aten.eq.Tensor, (along, index))
            zero = _call(graph, aten.full.default, ([], 0.0), {"dtype": value.dtype, "device": value.device})
            found = _call(graph, aten.where.self, (here, source, zero))
            found.meta = {**node.meta, "val": found.meta["val"]}
        node.replace_all_uses_with(found)
        graph.erase_node(node)


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
    node = graph.call_function(target, args, kwargs or {})
    node.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]), **(kwargs or {}))
    return node


def _dim(node: fx.Node) -> int:
    x: Any = node.args[0]
    dim: Any = node.args[1]
    return int(dim) % max(x.meta["val"].dim(), 1)


def _is_zero(node: Any) -> bool:
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), Tensor):
        return False
    return node.target in _ZEROS or (node.target is aten.full.default and bool(node.args[1] == 0))
