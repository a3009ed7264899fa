"""torch's compiler, as we use it: its private names stand here, and tests/compiler/test_inductor.py notices a change.

The public `torch.compile` is not enough: a call through Dynamo's guards costs 50 us, half a step of a small model, it
knows other limits of Python than a function that is run, and it cannot be given a graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx
from torch._functorch import config as functorch_config
from torch._functorch import partitioners
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._inductor.codegen.cpp import CppScheduling
from torch._inductor.compile_fx import _recursive_joint_graph_passes, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.fx_passes import joint_graph
from torch._inductor.lowering import make_fallback
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._python_dispatch import _disable_current_modes

from functrain.compiler import graph_passes, half_products, redrawing
from functrain.compiler.inductor import jobs, threefry  # noqa: F401, registers

aten = torch.ops.aten
Kernel = Callable[[list[Any]], Sequence[Any]]  # takes the inputs, a list that it empties, and returns the results
Strides = list[Any]  # of each result; None where it is laid out as the graph says

# what `graph_passes.write_early` writes. torch finds by itself that it has no lowering for it, but raises then where
# the environment has CI
make_fallback(aten.addmm_.default, override_decomp=True)
make_fallback(aten.embedding_dense_backward.default, override_decomp=True)


def compile_graph(graph: fx.Graph, mode: FakeTensorMode) -> Kernel:
    """Compile a graph of operations, writes to its inputs at the end, as one program."""
    module = fx.GraphModule({}, graph)
    with compiling(mode):
        _joint_passes(module)
        redrawing.draw_again(module.graph, graph_passes.is_product)
    return lower(module, mode, "inference")[0]


def _joint_passes(module: fx.GraphModule) -> None:
    """Run torch's passes over a whole graph; where there is no batched product, without the 0.3 s that patterns of
    attention written out take to prepare."""
    nodes = list(module.graph.nodes)
    inputs = [node.meta.get("val") for node in nodes if node.op == "placeholder"]
    plain = all(x.device.type == "cpu" for x in inputs if isinstance(x, Tensor)) and not any(
        node.target in (aten.bmm.default, aten.baddbmm.default) for node in nodes
    )
    with patch.object(joint_graph, "lazy_init", lambda _: None) if plain else nullcontext():
        _recursive_joint_graph_passes(module)


def partition(
    graph: fx.Graph, mode: FakeTensorMode, results: int, *, lasting: Sequence[int], lean: bool, budget: float
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split the graph of a function and its gradient in two: the first returns the first results, and what it keeps.

    Inputs named "tangents..." are the second one's; to keep those that are `lasting` costs nothing. With `lean` the
    second computes the inputs of its matrix products again where that takes none; else torch keeps them, which is half
    of a transformer's activations. `budget` is the part of the memory that is kept at all.
    """
    module = fx.GraphModule({}, graph)
    settings = functorch_config.patch(
        ban_recompute_materialized_backward=not lean,
        activation_memory_budget=budget,
    )
    with compiling(mode), settings, ExitStack() as stack:
        _joint_passes(module)
        redrawing.mark(module.graph)
        # attention says of itself that it draws, also where it drops nothing; what does draw is in no trace
        stack.enter_context(patch.object(partitioners, "has_recomputable_rng_ops", lambda _: False))
        return partitioners.min_cut_rematerialization_partition(
            module, [], "inductor", num_fwd_outputs=results, static_lifetime_input_indices=list(lasting)
        )


def eliminate_dead(graph: fx.Graph) -> None:
    """Take out what nobody uses; inputs stay."""
    graph.eliminate_dead_code()


def pass_inputs_by(forward: fx.GraphModule, results: int) -> list[tuple[bool, int]]:
    """Take inputs out of what a forward program returns to be kept, as whoever calls it has them; tell for each value
    that is kept (True, i), an input, or (False, j), what the program returns."""
    inputs = {
        node: i
        for i, node in enumerate(forward.graph.find_nodes(op="placeholder"))
        # torch's compiler lays these out anew, and the backward program would have to do it once more
        if not any("convolution" in str(user.target) for user in node.users)
    }
    end: Any = forward.graph.output_node()
    nodes = list(end.args[0])
    own = [*nodes[:results], *dict.fromkeys(node for node in nodes[results:] if node not in inputs)]
    end.args = (tuple(own),)
    forward.recompile()
    places = {node: i for i, node in enumerate(own)}
    return [(True, inputs[node]) if node in inputs else (False, places[node]) for node in nodes[results:]]


def lay_out(backward: fx.GraphModule, strides: Sequence[Any]) -> None:
    """Tell a backward program how the first of its inputs lie, where the forward program has laid them out anew."""
    for node, found in zip(backward.graph.find_nodes(op="placeholder"), strides, strict=False):
        value = node.meta["val"]
        if found is not None and value.stride() != found:
            with compiling(value.fake_mode), value.fake_mode:
                node.meta["val"] = torch.empty_strided(value.shape, found, dtype=value.dtype, device=value.device)


def lower(
    module: fx.GraphModule, mode: FakeTensorMode, which: str, *, visible: int | None = None, given: Sequence[int] = ()
) -> tuple[Kernel, Strides]:
    """Compile a graph as it stands, "forward", "backward" or "inference"; also returns how the results are laid out.

    The first `visible` results, or all, are laid out as the graph says. A backward program may write to those inputs
    that are `given` to it, in whose memory nothing else lies.
    """
    graph_passes.let_views_copy(module)
    graph_passes.unstack_sums(module.graph)
    graph_passes.compute_numbers_once(module.graph)
    if which == "backward":
        graph_passes.finish_early(module.graph)
        graph_passes.scatter_late(module.graph)
    half_products.widen(module.graph)
    graph_passes.name_in_order(module.graph)
    module.recompile()
    inputs = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    end: Any = module.graph.output_node()
    count = len(end.args[0])
    shown = end.args[0][: count if visible is None else visible]
    end.meta["user_visible_output_idxs"] = [i for i, node in enumerate(shown) if isinstance(node, fx.Node)]
    wanted = {i: shown[i].meta["val"] for i in end.meta["user_visible_output_idxs"]}  # torch changes the graph
    jobs.finish_checks()
    options = {**_OPTIONS, "post_grad_custom_post_pass": _Products(tuple(given))}
    with compiling(mode) as context, config.patch(options), _writes_in_order(), warnings.catch_warnings():
        context.fw_metadata = SimpleNamespace(bw_donated_idxs=list(given))
        # of torch 2.13 to itself, where it compiles a diagonal
        warnings.filterwarnings("ignore", "`torch._prims_common.check` is deprecated", FutureWarning)
        with TracingContext.report_output_strides() as strides:
            kernel: Any = compile_fx_inner(
                module, inputs, is_backward=which == "backward", is_inference=which == "inference"
            )
    found = [None if s is None else tuple(map(int, s)) for s in strides or [None] * count]
    other = {i: value.stride() for i, value in wanted.items() if not _lies_as(value, found[i])}
    return (_laid_out(kernel, other) if other else kernel), found


def _lies_as(value: Tensor, strides: tuple[int, ...] | None) -> bool:
    places = zip(value.shape, value.stride(), strides or value.stride(), strict=True)
    return all(n == 1 or a == b for n, a, b in places)


def _laid_out(kernel: Kernel, strides: dict[int, tuple[int, ...]]) -> Kernel:
    """Copy results that torch's compiler lays out in its own way, as it does gradients of a convolution's weights."""

    def run(values: list[Any]) -> list[Any]:
        found = list(kernel(values))
        for i, wanted in strides.items():
            found[i] = torch.empty_strided(found[i].shape, wanted, dtype=found[i].dtype, device=found[i].device).copy_(
                found[i]
            )
        return found

    return run


@contextmanager
def compiling(mode: FakeTensorMode) -> Iterator[Any]:
    """Leave the trace that is going on, and compile under the fake tensors of one that is done."""
    with ExitStack() as stack:
        stack.enter_context(tracing(None))
        stack.enter_context(_disable_current_modes())
        context = stack.enter_context(tracing(TracingContext(mode)))
        stack.enter_context(torch.no_grad())
        yield context


def compile_for_any_length(graph: fx.Graph, dtypes: Sequence[torch.dtype], lines: Sequence[bool]) -> Kernel:
    """Compile a graph of elementwise operations and sums whose inputs are one-dimensional where `lines` says so, all of
    one length, and () elsewhere."""
    with tracing(None), _disable_current_modes():
        mode = FakeTensorMode(shape_env=ShapeEnv())
        any_length: Any = StatelessSymbolicContext([DimDynamic.DYNAMIC])
        length = mode.from_tensor(torch.empty(_LENGTH, device="meta"), symbolic_context=any_length).shape[0]
        copied, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        kinds = iter(zip(dtypes, lines, strict=True))
        with mode, torch.no_grad():
            for node in graph.nodes:
                copies[node] = copy = copied.node_copy(node, lambda n: copies[n])
                if node.op == "placeholder":
                    dtype, line = next(kinds)
                    copy.meta["val"] = torch.empty((length,) if line else (), dtype=dtype)
                elif node.op == "call_function":
                    args, kwargs = fx.node.map_arg((copy.args, copy.kwargs), lambda n: n.meta["val"])
                    copy.meta["val"] = node.target(*args, **kwargs)
        return compile_graph(copied, mode)


_LENGTH = 1031  # that no constant of an update equals by chance


@contextmanager
def _writes_in_order() -> Iterator[None]:
    """Keep torch's compiler from reading a buffer before the scatter that is to write it.

    torch 2.13 fuses a loop over (6, 2) with one over (12,), and forgets on the way that a buffer which the second reads
    is written in place by a third (`SchedulerNode.recompute_size_and_body` drops the renamed dependencies): the fused
    loop then runs too early, in silence. Loops that touch such a buffer are not fused this way.
    """
    scheduling: Any = CppScheduling
    compatible = scheduling._can_fuse_nodes_with_compatible_ranges

    def careful(self: Any, first: Any, second: Any) -> bool:
        renamed = self.scheduler.mutation_renames
        written = {*renamed, *renamed.values()}
        names = {dep.name for node in (first, second) for dep in node.read_writes.reads_and_writes()}
        return not names & written and compatible(self, first, second)

    scheduling._can_fuse_nodes_with_compatible_ranges = careful
    try:
        yield
    finally:
        scheduling._can_fuse_nodes_with_compatible_ranges = compatible


class _Products(CustomGraphPass):
    """Choose how a product is added to something.

    A small addmm of one row becomes mm and an addition, which fuses with what follows: addmm first copies its row to
    every line of the result, so that a 32x64 one takes 15 us, and mm 4 us. A large one of a matrix that nobody else
    reads is added in that matrix' memory, as the two gradients of an embedding that is the head, too.
    """

    def __init__(self, given: tuple[int, ...]) -> None:
        self.given = given

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
            row, a, b = node.args
            value = node.meta["val"]
            if not node.kwargs and value.numel() > _SMALL and graph_passes.is_own(row, value):
                with graph.inserting_before(node):
                    graph.call_function(aten.addmm_.default, (row, a, b)).meta.update(node.meta)
                # what comes after reads the matrix as it is by then
                node.replace_all_uses_with(row)
                graph.erase_node(node)
                continue
            if node.kwargs or value.device.type != "cpu" or value.numel() > _SMALL or graph_passes.dim_of(row) != 1:
                continue
            with graph.inserting_before(node):
                product = graph.call_function(aten.mm.default, (a, b))
                total = graph.call_function(aten.add.Tensor, (product, row))
            product.meta["val"], total.meta["val"] = value, value
            node.replace_all_uses_with(total)
            graph.erase_node(node)

    def uuid(self) -> Any:
        # torch's cache of programs does not look at which inputs are given away
        return get_hash_for_files((__file__, graph_passes.__file__), f"products {self.given}")


_SMALL = 2**16

_OPTIONS: dict[str, Any] = {
    "size_asserts": False,  # 0.5 us an input; whoever calls has compared the shapes
}
