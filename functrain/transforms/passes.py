"""What we ask of Inductor beyond its defaults, for graphs of many small operations on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._functorch.compile_utils import fx_graph_cse  # private, tested: Inductor runs no CSE on a graph without grads
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

aten = torch.ops.aten


def merge(graph: fx.Graph) -> fx.Graph:
    """Compute the same thing once: a clipping norm, say, and the same norm as a metric."""
    return fx_graph_cse(graph)


def unstack_sums(graph: fx.Graph) -> None:
    """Turn the sum of stacked numbers into additions: a stack is a buffer, a view and a copy for each number."""
    for node in graph.find_nodes(op="call_function", target=aten.sum.default):
        stack = node.args[0]
        if len(node.args) > 1 or stack.target is not aten.stack.default or stack.meta["val"].dim() != 1:
            continue
        with graph.inserting_before(node):
            total = stack.args[0][0]
            for term in stack.args[0][1:]:
                total = graph.call_function(aten.add.Tensor, (total, term))
                total.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(total)
        graph.erase_node(node)
        if not stack.users:
            graph.erase_node(stack)


class _Unfuse(CustomGraphPass):
    """Turn addmm with a bias row into mm and an addition, which fuses with what follows.

    A 32x64 addmm takes 15 us on a CPU, mm 4 us: addmm first copies the row to every line of the result.
    """

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
            bias, a, b = node.args
            value = node.meta["val"]
            if node.kwargs or value.device.type != "cpu" or value.numel() > _SMALL or bias.meta["val"].dim() != 1:
                continue
            with graph.inserting_before(node):
                product = graph.call_function(aten.mm.default, (a, b))
                total = graph.call_function(aten.add.Tensor, (product, bias))
            product.meta["val"], total.meta["val"] = value, value
            node.replace_all_uses_with(total)
            graph.erase_node(node)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,), "unfuse")


_SMALL = 2**16

OPTIONS: dict[str, Any] = {
    "post_grad_custom_post_pass": _Unfuse(),
    "size_asserts": False,  # 0.5 us an input; Dynamo's guards have checked them
}
