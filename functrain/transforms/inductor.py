"""torch's compiler, as we use it: every private name of torch stands here, and tests/test_inductor.py notices a change.

The public `torch.compile` is not enough: a call through Dynamo's guards costs 50 us, half a step of a small model, and
a backend of our own needs a functional graph and the compiler that Dynamo would call with it.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.compile_utils import fx_graph_cse
from torch._inductor import config
from torch._inductor.codegen.cpp import CppScheduling
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.lowering import make_fallback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes

from functrain.losses import chunked, cross_entropy
from functrain.transforms import compiler_jobs, donation, engine, graph_passes, recompute_compiled, redrawing, regions
from functrain.transforms.forward_mode import DenseZeros

aten = torch.ops.aten
Kernel = Callable[..., Sequence[Any]]  # takes the graph's inputs, returns its outputs

# Dynamo takes a function with a gradient of its own apart, for 50 ms a call and with a warning about itself
torch.compiler.allow_in_graph(donation.give_gradient)
# what `graph_passes.write_early` writes. torch finds by itself that it has no lowering for it, but raises then where
# the environment has CI
make_fallback(aten.addmm_.default, override_decomp=True)


def trace(fn: Callable[..., Any], inputs: Sequence[Any], *, any_length: bool = False) -> fx.GraphModule:
    """Run `fn` on tensors without data, and return the operations it did; with `any_length`, for inputs of any size."""

    def dense(*args: Any) -> Any:
        with DenseZeros():
            return fn(*args)

    mode: Any = "symbolic" if any_length else "fake"
    with _recurrent_nets_as_operations():
        return make_fx(dense, tracing_mode=mode, _allow_non_fake_inputs=True)(*inputs)


@contextmanager
def _recurrent_nets_as_operations() -> Iterator[None]:
    """Trace an LSTM on a CPU as what it does: torch 2.13 fails to compile the kernel that it has for it.

    The switch is the whole process's: around a program that runs, convolutions would take twice as long, and products
    in bfloat16 nine times.
    """
    kernels: Any = torch.backends.mkldnn
    before = kernels.enabled
    kernels.enabled = False
    try:
        yield
    finally:
        kernels.enabled = before


def compile_graph(graph: fx.GraphModule, inputs: Sequence[Any]) -> Kernel:
    """Compile a traced graph as one program."""
    graph_passes.let_views_copy(graph)
    graph_passes.unstack_sums(graph.graph)
    graph_passes.compute_numbers_once(graph.graph)
    compiler_jobs.finish_checks()
    with config.patch(_OPTIONS), _writes_in_order(), warnings.catch_warnings():
        # of torch 2.13 to itself, where it compiles a diagonal
        warnings.filterwarnings("ignore", "`torch._prims_common.check` is deprecated", FutureWarning)
        kernel: Any = compile_fx(graph, inputs)
    return kernel


def compile_differentiable(fn: Callable[..., Any], *, keep_less: bool = False) -> Callable[..., Any]:
    """Compile a function as one graph that autograd differentiates from outside: a forward and a backward program.

    With `keep_less` the backward program computes the inputs of its matrix products again where that takes none, such
    as activation functions, norms and casts; else torch keeps them, which is half of a transformer's activations.
    """
    # torch keeps no compiled graph on disk that calls a function it does not know, unless we vouch for it: the code of
    # these is all in these files, and their hash is part of the key
    code = b"".join(Path(str(module.__file__)).read_bytes() for module in (chunked, cross_entropy, donation))
    names = ("losses.chunked.total_of_chunks", "transforms.donation.give_gradient")
    known = {f"functrain.{name}": hashlib.sha256(code).hexdigest() for name in names}
    options: dict[str, Any] = {
        "unsafe_marked_cacheable_functions": known,
        "joint_custom_pre_pass": _KeepNamed(),
        "joint_custom_post_pass": _Redraw("mark"),
    }

    def backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Kernel:
        # without donated buffers: torch 2.13 numbers them by the whole graph's inputs and looks them up by a region's,
        # so that a region overwrites its parameters (read in GraphLowering, seen in gradients)
        # the backward at once, not when it first runs: it is lowered while the forward's kernels are compiled
        compiler_jobs.finish_checks()
        budgets = {*engine.here.memory_budgets}
        engine.here.memory_budgets.clear()
        if len(budgets) > 1:
            raise ValueError(f"recompute: expected one part of the memory to keep in a compiled loss, came {budgets}")
        settings = functorch_config.patch(
            donated_buffer=False,
            force_non_lazy_backward_lowering=True,
            ban_recompute_materialized_backward=not keep_less,
            activation_memory_budget=budgets.pop() if budgets else 1.0,
        )
        with settings, _writes_in_order(), compiler_jobs.together(inputs), _recurrent_nets_as_operations():
            kernel: Any = compile_fx(graph, inputs, inner_compile=_compile_unshared, config_patches=options)
        return kernel

    compiled = torch.compile(fn, fullgraph=True, dynamic=False, backend=backend)

    def run(*args: Any, **kwargs: Any) -> Any:
        engine.here.memory_budgets.clear()  # of a trace that failed before anybody read them
        # Dynamo counts the programs of all losses together, and refuses the ninth; JAX has no such limit
        options = {"recompile_limit": _UNLIMITED, "accumulated_recompile_limit": _UNLIMITED, "allow_rnn": True}
        with dynamo_config.patch(options):
            return compiled(*args, **kwargs)

    return run


_UNLIMITED = 2**31 - 1


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


def _compile_unshared(graph: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
    regions.unshare(graph)
    regions.add_inside(graph)
    graph_passes.write_early(graph.graph)
    return compile_fx_inner(graph, inputs, **options)


def compile_functional(
    graph: fx.GraphModule, inputs: Sequence[Any], compiler: Callable[[fx.GraphModule], Kernel]
) -> Kernel:
    """Hand `compiler` a graph without side effects but writes to its inputs, and with the same thing computed once."""

    def compile_one(functional: fx.GraphModule, _: Any) -> Any:
        kernel = compiler(fx.GraphModule(functional, fx_graph_cse(functional.graph)))

        def boxed(args: list[Any]) -> Sequence[Any]:
            return kernel(*args)

        boxed._boxed_call = True  # type: ignore[attr-defined]  # how torch knows that it may pass a list
        return boxed

    if all(_is_functional(node) for node in graph.graph.nodes):
        return compiler(fx.GraphModule(graph, fx_graph_cse(graph.graph)))
    compile_any: Any = compile_one
    return aot_module_simplified(graph, list(inputs), fw_compiler=compile_any, keep_inference_input_mutations=True)


def _is_functional(node: fx.Node) -> bool:
    """Tell whether a node only computes, or stores a value in an input that nothing reads afterwards."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return True
    return node.target is aten.copy_.default and node.args[0].op == "placeholder" and not node.users  # type: ignore[union-attr]


def compile_for_any_length(graph: fx.Graph, dtypes: Sequence[torch.dtype], lines: Sequence[bool]) -> Kernel:
    """Compile a graph whose inputs are one-dimensional where `lines` says so, all of one length, and () elsewhere."""
    with _apart():
        # a length that no constant of an update equals by chance
        examples = [torch.empty(1031 if line else (), dtype=d) for d, line in zip(dtypes, lines, strict=True)]
        traced = trace(fx.GraphModule({}, graph), examples, any_length=True)
        return compile_graph(traced, [node.meta["val"] for node in traced.graph.nodes if node.op == "placeholder"])


def compile_part(graph: fx.Graph, inputs: Sequence[Tensor]) -> Kernel:
    """Compile a graph cut out of another one that is being compiled."""
    with _apart():
        return compile_graph(fx.GraphModule({}, graph), inputs)


@contextmanager
def _apart() -> Iterator[None]:
    """Leave the compilation that is going on, whose shapes torch would otherwise take for ours."""
    with torch._guards.tracing(None), _disable_current_modes():
        yield


def no_cxx_compiler(error: BaseException | None) -> bool:
    """Tell whether an error, or one that caused it, says that there is no C++ compiler."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, InvalidCxxCompiler):
            return True
        seen.append(error)
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return False


class _Unfuse(CustomGraphPass):
    """Turn a small addmm into mm and an addition, which fuses with what follows: addmm first copies its row to every
    line of the result, so that a 32x64 one takes 15 us, and mm 4 us."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
            row, a, b = node.args
            value = node.meta["val"]
            if node.kwargs or value.device.type != "cpu" or value.numel() > _SMALL or graph_passes.dim_of(row) != 1:
                continue
            with graph.inserting_before(node):
                product = graph.call_function(aten.mm.default, (a, b))
                total = graph.call_function(aten.add.Tensor, (product, row))
            product.meta["val"], total.meta["val"] = value, value
            node.replace_all_uses_with(total)
            graph.erase_node(node)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__, graph_passes.__file__), "unfuse")


_SMALL = 2**16


class _Redraw(CustomGraphPass):
    """A pass of `redrawing`, over the graph of both passes: to `mark`, or to draw "again" where nobody partitions."""

    def __init__(self, what: Literal["mark", "again"]) -> None:
        self.what = what

    def __call__(self, graph: fx.Graph) -> None:
        if self.what == "mark":
            redrawing.mark(graph)
        else:
            redrawing.draw_again(graph, graph_passes.is_product)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__, redrawing.__file__, graph_passes.__file__), self.what)


class _KeepNamed(CustomGraphPass):
    """What `checkpoint_name` names, before the partitioner chooses what to keep; and a check of the whole graph."""

    def __call__(self, graph: fx.Graph) -> None:
        graph_passes.check_drawn_from_keys(graph)
        recompute_compiled.keep_named(graph)

    def uuid(self) -> Any:
        files = (__file__, recompute_compiled.__file__, graph_passes.__file__)
        return get_hash_for_files(files, "keep named")


_OPTIONS: dict[str, Any] = {
    "joint_custom_post_pass": _Redraw("again"),
    "post_grad_custom_post_pass": _Unfuse(),
    "size_asserts": False,  # 0.5 us an input; whoever calls has compared the shapes
}
