"""Graphs rewritten before torch compiles them, where its own choice costs much or does not work."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from functrain.compiler.arguments import same_value

aten = torch.ops.aten


class Name(str):
    """What stands for a node where operations are compared as text."""

    __slots__ = ()
    __repr__ = str.__str__


def let_views_copy(module: fx.GraphModule) -> None:
    """Turn views into reshapes, which copy where the compiler has laid out their argument in another way than eager."""
    for node in module.graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default
    module.recompile()


def unstack_sums(graph: fx.Graph) -> None:
    """Turn the sum of stacked numbers into additions: a stack is a buffer, a view and a copy for each number."""
    for node in list(graph.nodes):
        terms = stacked_numbers(node)
        if not terms:
            continue
        with graph.inserting_before(node):
            total = terms[0]
            for term in terms[1:]:
                total = graph.call_function(aten.add.Tensor, (total, term))
                total.meta.update(node.meta)
        node.replace_all_uses_with(total)
        graph.erase_node(node)
    graph.eliminate_dead_code()


def compute_once(graph: fx.Graph) -> fx.Graph:
    """Let the same thing be computed once; return the graph. Writes to inputs come last.

    Two results that are equal stay two tensors, as a caller may write to one of them.
    """
    end: Any = graph.output_node()
    base: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        part = node.target is operator.getitem or is_view(node.target)
        base[node] = base[node.all_input_nodes[0]] if part else node
    returned = {base[node] for node in end.all_input_nodes}
    known: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or base[node] in returned or not _is_function(node.target):
            continue
        try:
            found = known.setdefault((node.target, _comparable(node.args), _comparable(node.kwargs)), node)
        except TypeError:  # an argument without a hash
            continue
        if found is not node:
            node.replace_all_uses_with(found)
            graph.erase_node(node)
    return graph


def _is_function(target: Any) -> bool:
    """Tell whether an operation gives the same for the same."""
    if target is operator.getitem:
        return True
    drawn = isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags
    return isinstance(target, torch._ops.OpOverload) and not (
        drawn or target._schema.is_mutable or target.overloadpacket in (aten.empty, aten.empty_strided)
    )


def _comparable(value: Any) -> Any:
    """Make of an argument what equals that of the same operation alone."""
    if isinstance(value, (tuple, list)):
        return tuple([_comparable(x) for x in value])
    if isinstance(value, dict):
        return tuple([(name, _comparable(x)) for name, x in value.items()])
    if isinstance(value, fx.Node):
        return value
    return same_value(value)


def stacked_numbers(node: fx.Node) -> list[fx.Node]:
    """Return what a node adds up, if it is the sum of () tensors that are stacked for it alone."""
    stack: Any = node.args[0] if node.target is aten.sum.default and len(node.args) == 1 else None
    if stack is None or stack.target is not aten.cat.default or len(stack.users) > 1:
        return []
    lines = stack.args[0]
    if any(n.target is not aten.unsqueeze.default or len(n.users) > 1 or dim_of(n.args[0]) for n in lines):
        return []
    return [n.args[0] for n in lines]


def write_early(graph: fx.Graph) -> None:
    """Move an addition to an input right behind the value that is added, so that this value need not live any longer.

    torch writes to inputs at the end of a program: all gradients would lie there beside the sums they are added to. A
    matrix product is added as it is computed, and never there as a value.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        found = addition(node)
        if found is None:
            continue
        into, total, write = found
        last = max(total.all_input_nodes, key=order.__getitem__)
        if node.target is aten.mm.default and node.meta["val"].dtype == into.meta["val"].dtype:
            with graph.inserting_after(last):
                graph.call_function(aten.addmm_.default, (into, *node.args)).meta.update(write.meta)
            for old in (write, total, node):
                graph.erase_node(old)
        elif last.op != "placeholder":
            last.append(total)
            total.append(write)


def finish_early(graph: fx.Graph) -> None:
    """Move a matrix product that is a result, as of a layer's weights, right behind the value that it needs last, so
    that what was kept for it is let go before more is computed."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.target is not aten.mm.default or not _is_result(node):
            continue
        views: list[fx.Node] = []
        sources = []
        for value in node.all_input_nodes:
            while is_view(value.target):
                views.append(value)
                value = value.all_input_nodes[0]
            sources.append(value)
        last = max(sources, key=order.__getitem__)
        if last.op == "placeholder":
            continue
        last.append(node)
        for view in sorted(views, key=order.__getitem__):
            if order[view] > order[last]:
                node.prepend(view)


def scatter_late(graph: fx.Graph) -> None:
    """Move the gradient of an embedding, and what is added to it until it is a result, to the end of a program.

    It is as large as the embedding, made from one vector a token: before that, all that is kept for the rest of the
    backward pass would lie beside it.
    """
    end = graph.output_node()
    for node in list(graph.find_nodes(op="call_function", target=aten.embedding_dense_backward.default)):
        chain = [node]
        while len(chain[-1].users) == 1 and end not in chain[-1].users:
            chain += chain[-1].users
        if end not in chain[-1].users or any(n.target is aten.copy_.default for n in chain):
            continue
        for link in chain:
            end.prepend(link)


def _is_result(node: fx.Node) -> bool:
    users = list(node.users)
    while len(users) == 1 and is_view(users[0].target):
        users = list(users[0].users)
    return bool(users) and all(user.op == "output" for user in users)


def is_view(target: Any) -> bool:
    """Tell whether a node's target is an operation whose result lies in its first argument's memory, or mostly does."""
    return isinstance(target, torch._ops.OpOverload) and (target.is_view or target in _VIEWS)


# the schemas do not say so; a reshape is one that `let_views_copy` has made
_VIEWS = {aten._unsafe_view.default, aten._reshape_alias.default, aten.reshape.default}


def is_own(node: Any, like: Tensor) -> bool:
    """Tell whether a node makes a tensor of this kind in memory of its own, which one other node reads."""
    if node.op != "call_function" or len(node.users) != 1 or is_view(node.target):
        return False
    value, target = node.meta["val"], node.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    if target in _CASTS and node.all_input_nodes[0].meta["val"].dtype == value.dtype:
        return False  # torch's compiler makes nothing of it
    return value.shape == like.shape and value.dtype == like.dtype and value.stride() == like.stride()


_CASTS = {torch.ops.prims.convert_element_type.default, aten._to_copy.default}


def addition(node: fx.Node) -> tuple[Any, fx.Node, fx.Node] | None:
    """The sum, the addition and the write of a value that is added to an argument in its memory, and else unread."""
    total = next(iter(node.users), node)
    write = next(iter(total.users), node)
    if total.target is not aten.add.Tensor or write.target is not aten.copy_.default or len(total.args) != 2:
        return None
    into = write.args[0]
    alone = {*node.users} == {total} and {*total.users} == {write} and not write.users and not total.kwargs
    if not alone or write.args[1] is not total or not isinstance(into, fx.Node) or into.op != "placeholder":
        return None
    return (into, total, write) if {*total.args} == {into, node} and {*into.users} == {total, write} else None


def is_product(node: fx.Node) -> bool:
    """Tell whether a node multiplies matrices, or calls anything else that is no loop of ours."""
    return node.target in _PRODUCTS or "convolution" in str(node.target)


_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.mv.default}


def compute_numbers_once(graph: fx.Graph) -> None:
    """Give a number that costs much, and that larger tensors are computed with, a kernel of its own.

    Inductor writes the operations of a () tensor into the loop of every kernel that reads it. With the powers of a
    bias correction and the cosine of a schedule there, AdamW over 7 million parameters takes 40 ms instead of 9. It
    never writes out a reduction there; 16 copies are enough for it to stay one. So does a number that many operations
    lead to, and which several read: a guard's verdict, in a graph of many numbers, takes half a minute to compile else.
    """
    costly: dict[fx.Node, None] = {}  # no set: its order is another one in each process, and so would the program be
    for node in list(graph.nodes):
        if node.op != "call_function" or dim_of(node) or node.target in _REDUCTIONS:
            continue
        if node.target not in _CHEAP or any(arg in costly for arg in node.all_input_nodes):
            costly[node] = None
    for node in costly:
        _compute_once(graph, node, [user for user in node.users if user.op == "call_function" and dim_of(user)])
    written: dict[fx.Node, int] = {}  # how many operations stand where a number is read
    for node in list(graph.nodes):
        if node.op != "call_function" or dim_of(node):
            continue
        inside = [arg for arg in node.all_input_nodes if not dim_of(arg)]
        written[node] = 1 + sum(written.get(arg, 1) for arg in inside)
        if written[node] > _LONG and len(node.users) > 1:
            _compute_once(graph, node, [user for user in node.users if user.op == "call_function"])
            written[node] = 1


def name_in_order(graph: fx.Graph) -> None:
    """Name what is computed by its place in the graph.

    A program is known by its text, and kept under it for the next process and for other ranks; the names that a trace
    gives count what it has recorded and dropped too, as the first use of a kind or of a placement is.
    """
    for i, node in enumerate(graph.nodes):
        if node.op == "call_function":
            node.name = f"value_{i}"


def _compute_once(graph: fx.Graph, node: fx.Node, readers: list[fx.Node]) -> None:
    value = node.meta["val"]
    if not readers or value.is_complex():  # of complex numbers torch's compiler writes no loops
        return
    reduction = aten.any.default if value.dtype == torch.bool else aten.amax.default
    with graph.inserting_after(node):
        copies = graph.call_function(aten.expand.default, (node, [16]))
    with graph.inserting_after(copies):
        number = graph.call_function(reduction, (copies,))
    copies.meta["val"], number.meta["val"] = value.expand(16), value
    for user in readers:
        user.replace_input_with(node, number)


_LONG = 50  # operations, counted as often as they are written

_REDUCTIONS = {aten.sum.default, aten.sum.dim_IntList, aten.amax.default, aten.max.default, aten.min.default,
               aten.any.default, aten.all.default, aten.mean.default, aten.mm.default, aten.dot.default}  # fmt: skip
_CHEAP = {aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.mul.Tensor, aten.neg.default, aten.abs.default,
          aten.where.self, aten.maximum.default, aten.minimum.default, aten.clamp.default, aten._to_copy.default,
          aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.le.Scalar, aten.eq.Scalar, aten.ne.Scalar,
          aten.gt.Tensor, aten.ge.Tensor, aten.lt.Tensor, aten.le.Tensor, aten.eq.Tensor, aten.ne.Tensor,
          aten.copy_.default, aten.full.default, aten.select.int, aten.view.default, aten.reshape.default,
          aten.alias.default, aten.detach.default}  # fmt: skip


def dim_of(node: fx.Node) -> int:
    """Return the number of dimensions of a node's value."""
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else 1  # a node without a value: do not touch it
