"""Updates compiled leaf by leaf: torch's private names do what we think, and alike leaves share a kernel."""

from __future__ import annotations

import errno
import gc
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from later import Later
from memory import peak_bytes
from programs import cut, lowered
from torch import Tensor, fx

import functrain as ft
from functrain.compiler import graph_passes, leafwise, tracing

# torch's compiler takes 2 s to load
cpu_vec_isa = Later("torch._inductor.cpu_vec_isa")
async_compile = Later("torch._inductor.async_compile")
joint_graph = Later("torch._inductor.fx_passes.joint_graph")
jobs = Later("functrain.compiler.inductor.jobs")
kernels = Later("functrain.compiler.inductor.kernels")
lowering = Later("functrain.compiler.inductor.lowering")


def traced(fn: Any, tensors: Sequence[Tensor]) -> tracing.Traced:
    return tracing.trace(lambda mode, *xs: (fn(*xs), []), tensors)


def leaf_by_leaf(fn: Any, *args: Any) -> Any:
    """Run what the compiler of updates makes of a function."""
    leaves, structure = ft.tree.flatten(args)
    found: list[Any] = []

    def flat(*leaves: Tensor) -> list[Tensor]:
        results, made = ft.tree.flatten(fn(*ft.tree.unflatten(structure, list(leaves))))
        found.append(made)
        return results

    graph = traced(flat, leaves)
    kernel = leafwise.compile_graph(graph.graph, graph.mode)
    return ft.tree.unflatten(found[0], list(kernel([*leaves])))


def update(leaves: list[Tensor], grads: list[Tensor], count: Tensor) -> tuple[list[Tensor], Tensor]:
    norm = torch.sqrt(torch.stack([torch.sum(g * g) for g in grads]).sum())
    scale = 0.1 / (norm + count)
    new = [p - scale * g for p, g in zip(leaves, grads, strict=True)]
    new[-1] = new[-1] @ new[-1]  # a leaf that is no column
    return new, norm


def test_alike_leaves_share_a_kernel_and_the_update_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    compile_for_any_length = lowering.compile_for_any_length
    monkeypatch.setattr(
        lowering, "compile_for_any_length", lambda *args: made.append(args) or compile_for_any_length(*args)
    )
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (7,), (200, 100), (2, 3, 4), (150, 120), (4, 4)]
    leaves, grads = ([torch.randn(s, generator=generator, dtype=torch.float32) for s in shapes] for _ in range(2))
    count = torch.tensor(2.0, dtype=torch.float32)
    new, norm = leaf_by_leaf(update, leaves, grads, count)
    expected, expected_norm = update(leaves, grads, count)
    # float32 sums of 4e4 squares in another order
    torch.testing.assert_close(new, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm, expected_norm, rtol=1e-5, atol=1e-5)
    assert len({leaf.untyped_storage().data_ptr() for leaf in new}) == len(new)
    assert len(made) == 2, "one kernel for the norms of five leaves, one for their updates"


def test_parts_of_a_split_that_are_read_in_turns_are_the_same() -> None:
    def of_parts(flat: Tensor, leaves: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        first, second, third = flat.split([1, 1, 2])
        scaled = [leaf * first.view(()) for leaf in leaves]
        norm = torch.sqrt(torch.stack([torch.sum(x * x) for x in scaled]).sum())
        # read when the norm is known, and not before
        return [x / (norm + second.view(())) for x in scaled], third.sort().values

    flat, leaves = torch.tensor([2.0, 3.0, 5.0, 4.0]), [torch.linspace(-1, 1, n) for n in (40, 50, 60)]
    torch.testing.assert_close(leaf_by_leaf(of_parts, flat, leaves), of_parts(flat, leaves), rtol=1e-5, atol=1e-5)


def test_a_costly_number_is_computed_once_and_not_for_every_element() -> None:
    count, x = torch.tensor(3), torch.linspace(-1.0, 1.0, 100)

    def scaled(count: Tensor, x: Tensor) -> list[Tensor]:
        late = torch.cos(count) > 0.0
        return [x * (1 - 0.9**count), torch.where(late, x, -x), x + 2 * count, 0.5**count]

    def numbers_read_by_lines(graph: fx.Graph) -> set[str]:
        lines = [node for node in graph.nodes if node.op == "call_function" and node.meta["val"].dim() == 1]
        return {str(arg.target) for node in lines for arg in node.all_input_nodes if arg.meta["val"].dim() == 0}

    graph = traced(scaled, [count, x])
    before = {"aten.sub.Tensor", "aten.gt.Scalar", "aten.mul.Tensor"}
    assert numbers_read_by_lines(graph.graph) == before
    graph_passes.compute_numbers_once(graph.graph)
    copied = {"aten.sub.Tensor", "aten.gt.Scalar"}  # only to be copied 16 times; twice a counter is cheap
    assert numbers_read_by_lines(graph.graph) == {"aten.amax.default", "aten.any.default", "aten.mul.Tensor"} | copied
    graph = traced(scaled, [count, x])
    found = lowering.compile_graph(graph.graph, graph.mode)([count, x])
    torch.testing.assert_close(list(found), scaled(count, x), rtol=1e-6, atol=1e-6)  # float32 powers


@pytest.mark.parametrize(("leaves", "product"), [(20, False), (20, True), (2, False)])
def test_a_plain_function_without_matrix_products_is_compiled_leaf_by_leaf(
    monkeypatch: pytest.MonkeyPatch, leaves: int, product: bool
) -> None:
    made: list[bool] = []
    compile_for_any_length = lowering.compile_for_any_length
    monkeypatch.setattr(
        lowering, "compile_for_any_length", lambda *args: made.append(True) or compile_for_any_length(*args)
    )
    square = torch.eye(3, dtype=torch.float32)
    params = [torch.full((2**19 // leaves,), float(i), dtype=torch.float32) for i in range(leaves)]

    def update(params: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        return [p * 0.5 + 1.0 for p in params], square @ square if product else square

    new, _ = ft.compile(update, donate=True)([p.clone() for p in params])
    for a, b in zip(new, params, strict=True):
        assert torch.equal(a, b * 0.5 + 1.0)
    assert made == ([True] if leaves == 20 and not product else [])


COMPLEX = pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")


def test_a_number_of_many_operations_is_written_once() -> None:
    """As a guard's verdict, which every number of a state is kept or left by."""

    def fn(numbers: list[Tensor]) -> list[Tensor]:
        new = [torch.sin(x) * 0.9 + torch.exp(-x) for x in numbers]
        good = torch.stack([torch.sum(torch.isfinite(x)) for x in new]).sum() == len(new)
        return [torch.where(good, a, b) for a, b in zip(new, numbers, strict=True)]

    numbers = [torch.tensor(float(i)) for i in range(40)]
    found = traced(lambda *xs: fn(list(xs)), numbers)
    module = fx.GraphModule({}, found.graph)
    graph_passes.unstack_sums(module.graph)
    graph_passes.compute_numbers_once(module.graph)
    module.graph.lint()
    seen: dict[fx.Node, int] = {}
    for node in module.graph.nodes:
        if node.op == "call_function":
            seen[node] = 1 + sum(seen.get(arg, 0) for arg in node.all_input_nodes if not graph_passes.dim_of(arg))
    chosen = module.graph.find_nodes(op="call_function", target=torch.ops.aten.where.self)
    assert len(chosen) == 40 and all(seen[node] < 60 for node in chosen)
    module.recompile()
    for a, b in zip(module(*numbers), fn(numbers), strict=True):
        assert torch.equal(a, b)


@COMPLEX
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float64, torch.complex64])
def test_a_number_of_any_dtype_is_computed_once(dtype: torch.dtype) -> None:
    def fn(x: Tensor, number: Tensor) -> Tensor:
        return x * (number.logical_not() if dtype == torch.bool else number**3)

    x, number = torch.arange(3.0).to(dtype), torch.tensor(2.0).to(dtype)
    torch.testing.assert_close(ft.compile(fn)(x, number), fn(x, number))


@COMPLEX
def test_complex_leaves_train_in_a_donated_step() -> None:
    optimizer = ft.optim.adamw(1e-2)
    step = ft.train_step(lambda w, x, key: torch.mean(torch.abs(x * w["w"] - 1) ** 2), optimizer)
    state = ft.init_state({"w": torch.ones(4, dtype=torch.complex64)}, optimizer, key=ft.random.key(0))
    x = torch.complex(torch.arange(4.0), torch.ones(4))
    expected, found = (
        step(state, x)[0].params,
        ft.compile(step, donate=True)(ft.tree.map(torch.clone, state), x)[0].params,
    )
    torch.testing.assert_close(found, expected)


def test_a_float64_update_is_compiled_as_an_ordinary_graph() -> None:
    leaves, grads = ([torch.full((3, 3), v, dtype=torch.float64) for _ in range(3)] for v in (1.0, 2.0))
    count = torch.tensor(2.0, dtype=torch.float64)
    new, norm = leaf_by_leaf(update, leaves, grads, count)
    expected, expected_norm = update(leaves, grads, count)
    torch.testing.assert_close((new, norm), (expected, expected_norm), rtol=1e-12, atol=1e-12)


def test_kernels_of_several_graphs_are_compiled_side_by_side() -> None:
    x, wait = torch.linspace(0.0, 1.0, 40), async_compile.AsyncCompile.wait
    functions = [lambda v: [torch.sin(v) * 1.25], lambda v: [torch.cos(v) * 1.75]]
    with jobs.together([x]):
        graphs = [traced(f, [x]) for f in functions]
        programs = [lowering.compile_graph(graph.graph, graph.mode) for graph in graphs]
        for program in programs:
            with pytest.raises(TypeError, match="not callable"):  # nobody has waited for it yet
                program([x])
    assert async_compile.AsyncCompile.wait is wait
    for program, f in zip(programs, functions, strict=True):
        # a vectorized sine differs from the eager one in the last place
        torch.testing.assert_close(list(program([x])), f(x), rtol=1e-6, atol=1e-6)


def test_what_the_cpu_can_do_is_found_out_beside_and_is_what_torch_finds() -> None:
    jobs.start_checks([torch.ones(1)])
    jobs.finish_checks()
    checks = jobs._checks()
    assert all(check.done() for check in checks)
    if checks:  # not asked on an ARM CPU
        found = cpu_vec_isa.valid_vec_isa_list()
        assert sum(check.result() for check in checks) == len(found) > 0
        # of the widest torch's own check, which ours leaves out
        assert found[0].check_build(cpu_vec_isa.VecISA._avx_code)


def kernel(number: float) -> kernels.Kernel:
    start = '#include <torch/csrc/inductor/cpp_prefix.h>\nextern "C" void kernel(const float* in_ptr0, float* out_ptr0)'
    return kernels.Kernel(["const float*", "float*"], f"{start}\n{{ *out_ptr0 = *in_ptr0 + {number}f; }}")


def test_kernels_share_a_file_where_there_are_few_cores() -> None:
    alike = [kernel(float(i)) for i in range(9)]
    odd = kernels.Kernel(["float*"], "static int once;\n" + kernel(1.0).code)
    assert kernels.libraries([*alike[:2], odd, *alike[2:]], 2) == [[0, 1, 3, 4, 5, 6, 7, 8], [9], [2]]
    assert kernels.libraries(alike[:3], 64) == [[0], [1], [2]]


def test_a_library_has_each_kernel_and_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    given, found = torch.tensor([2.0]), torch.zeros(1)
    for i, add in enumerate(kernels.load([kernel(0.5), kernel(3.0)], kernels.compile_header)):
        add(given, found)
        assert found.item() == (2.5, 5.0)[i]
        with pytest.raises(RuntimeError, match="requires 2 args"):
            add(given)
    built = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.so")}
    assert len(built) == 1 and not list(tmp_path.rglob("*.o"))

    def never() -> str:
        raise AssertionError("compiled once more")

    kernels.load([kernel(0.5), kernel(3.0)], never)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.so")} == built


def test_a_header_that_failed_once_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    full: Future[str | None] = Future()
    full.set_exception(OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(jobs, "_header", lambda: full)
    header = jobs._finish_header()
    assert header is not None and Path(header).exists()


def test_torch_may_be_told_to_compile_no_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    given, found = torch.tensor([2.0]), torch.zeros(1)
    with torch._inductor.config.patch(cpp_cache_precompile_headers=False):
        assert kernels.compile_header() is None
        kernels.load([kernel(0.25)], kernels.compile_header)[0](given, found)
    assert found.item() == 2.25


def test_what_the_cxx_compiler_says_of_a_kernel_is_raised_where_it_is_waited_for() -> None:
    broken: list[Any] = [
        (kernel(1.0), Future()),
        (kernels.Kernel(["float*"], "void kernel(float* x) { !; }"), Future()),
    ]
    jobs._load(broken)
    for _, future in broken:
        with pytest.raises(Later("torch._inductor.exc").CppCompileError, match="error: expected"):
            future.result(timeout=0)


def test_keeping_less_for_the_backward_changes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(w: list[Tensor], x: Tensor, key: None) -> ft.Loss:
        return ft.Loss(torch.sum(torch.nn.functional.gelu(x @ w[0]) @ w[1]), x.new_full((), len(x)), {})

    kept: list[int] = []
    partition = lowering.partition

    def seen(graph: fx.Graph, mode: Any, results: int, **options: Any) -> Any:
        forward, backward = partition(graph, mode, results, **options)
        values = forward.graph.output_node().args[0][results:]
        bases = {node.args[0] if node.target is torch.ops.aten.permute.default else node for node in values}
        kept.append(sum(node.meta["val"].nbytes for node in bases if node.op != "placeholder"))
        return forward, backward

    cut(monkeypatch)
    monkeypatch.setattr(lowering, "partition", seen)
    w = [torch.linspace(-1, 1, 32).view(4, 8), torch.linspace(1, -1, 16).view(8, 2)]
    gradient = ft.value_and_grad(loss)
    for fn, rows in ((gradient, 64), (ft.accumulate(gradient, rows=64), 128)):
        x = torch.linspace(-1, 1, 4 * rows).view(rows, 4)
        # float32 sums of 128 terms of about 1
        torch.testing.assert_close(ft.compile(fn)(w, x, None), gradient(w, x, None), rtol=1e-5, atol=1e-4)
    # 64 rows of x @ w[0], and but for parts of a batch of its activation, which the gradient of w[1] multiplies
    assert kept == [2 * 64 * 8 * 4, 64 * 8 * 4]


def test_a_gradient_has_a_forward_and_a_backward_program_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch)
    programs = lowered(monkeypatch)
    gradient = ft.compile(ft.value_and_grad(lambda w: torch.sum(torch.sin(w) * 0.625)))
    for size in (2, 3, 2):
        value, grad = gradient(torch.ones(size))
        # a vectorized cosine differs from the eager one in the last place
        torch.testing.assert_close(grad, torch.cos(torch.ones(size)) * 0.625, rtol=1e-6, atol=0.0)
    assert [program.which for program in programs] == ["forward", "backward"] * 2


def test_a_view_of_what_the_compiler_lays_out_in_another_way_is_a_copy() -> None:
    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([torch.sin(x), torch.cos(x)], 2)  # (3, 3, 24)
        rows = torch.cat([both.permute(2, 0, 1)], 1)  # of one tensor: a copy in eager alone
        return rows.view(72, 3) + 1, torch.bmm(rows, w)

    inputs = torch.arange(108.0).view(3, 3, 12) / 100, torch.ones(24, 3, 4)
    torch.testing.assert_close(ft.compile(fn)(*inputs), fn(*inputs))


@pytest.mark.parametrize("shape", [(4, 2), (2, 2, 2)])
def test_patterns_of_attention_are_looked_for_where_there_are_batched_products(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(joint_graph, "lazy_init", asked.append)
    ft.compile(lambda x: x @ x.mT)(torch.ones(shape))
    assert bool(asked) == (len(shape) == 3)


def test_garbage_is_not_collected_while_a_function_is_compiled() -> None:
    seen = []

    def fn(x: Tensor) -> Tensor:
        seen.append(gc.isenabled())
        return x + 1

    ft.compile(fn)(torch.ones(3))
    assert seen == [False]
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        ft.compile(lambda x: x / (1 // 0))(torch.ones(3))
    assert gc.isenabled()


def test_a_backward_program_works_in_the_memory_that_it_is_given() -> None:
    """torch learns of it by `fw_metadata.bw_donated_idxs`, and its cache of programs by our pass's `uuid`."""
    x, cotangent = torch.linspace(-1.0, 1.0, 4096), torch.ones(4096)

    def kept_and_result(given: list[int]) -> tuple[Tensor, Tensor]:
        found = traced(lambda x, tangent: [torch.cos(x) * tangent], [x, cotangent])
        program, _ = lowering.lower(fx.GraphModule({}, found.graph), found.mode, "backward", given=given)
        kept = x.clone()
        (result,) = program([kept, cotangent])
        return kept, result

    expected = torch.cos(x)
    for given in ([], [0], []):
        kept, result = kept_and_result(given)
        torch.testing.assert_close(result, expected)
        assert (result.data_ptr() == kept.data_ptr()) == bool(given)


def test_products_of_weights_come_as_soon_as_they_can() -> None:
    def backward(x: Tensor, w: Tensor, tangent: Tensor) -> list[Tensor]:
        cotangent = tangent * 2
        for _ in range(3):
            x_cotangent = torch.tanh(cotangent @ w.mT)
        return [x_cotangent, x.mT @ cotangent]

    args = [torch.linspace(0.0, 1.0, 12).view(3, 4), torch.ones(4, 4), torch.ones(3, 4)]
    graph = traced(backward, args).graph
    graph_passes.finish_early(graph)
    graph.lint()
    made = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert made.index("aten.mm.default") < made.index("aten.tanh.default")
    first = graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)[0]
    assert first is graph.output_node().args[0][1]
    for a, b in zip(fx.GraphModule({}, graph)(*args), backward(*args), strict=True):
        assert torch.equal(a, b)


def test_the_gradient_of_an_embedding_comes_last() -> None:
    def backward(tokens: Tensor, w: Tensor, head: Tensor, tangent: Tensor) -> list[Tensor]:
        scattered = torch.ops.aten.embedding_dense_backward(tangent, tokens, 32, -1, False)
        return [(scattered + head) * 2, torch.tanh(tangent @ w)]

    head = torch.linspace(0.0, 1.0, 32 * 4).view(32, 4)
    args = [torch.arange(6).view(2, 3), torch.ones(4, 4), head, torch.ones(2, 3, 4)]
    graph = traced(backward, args).graph
    graph_passes.scatter_late(graph)
    graph.lint()
    made = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert made.index("aten.tanh.default") < made.index("aten.embedding_dense_backward.default")
    for a, b in zip(fx.GraphModule({}, graph)(*args), backward(*args), strict=True):
        assert torch.equal(a, b)


def test_a_gradient_of_an_embedding_lies_beside_nothing_that_is_kept() -> None:
    def backward(tokens: Tensor, table: Tensor, w: Tensor, tangent: Tensor) -> list[Tensor]:
        scattered = torch.ops.aten.embedding_dense_backward(tangent, tokens, 8192, -1, False)
        for _ in range(3):
            tangent = torch.tanh(tangent @ w) @ w.mT
        return [scattered, tangent]

    tokens = torch.arange(64)
    args = [tokens, torch.zeros(8192, 16), torch.linspace(-1.0, 1.0, 16 * 2048).view(16, 2048), torch.ones(64, 16)]
    found = traced(backward, args)
    program, _ = lowering.lower(fx.GraphModule({}, found.graph), found.mode, "backward")
    for a, b in zip(program([*args]), backward(*args), strict=True):
        torch.testing.assert_close(a, b)
    table, hidden = 8192 * 16 * 4, 64 * 2048 * 4
    assert peak_bytes(lambda: program([*args])) < table + hidden


def test_a_cast_that_changes_nothing_has_no_memory_of_its_own() -> None:
    cast = torch.ops.prims.convert_element_type
    graph = traced(lambda x: [cast(x, torch.float32) + 1, cast(x, torch.float64) + 1], [torch.ones(3)]).graph
    own = [graph_passes.is_own(n, n.meta["val"]) for n in graph.find_nodes(op="call_function", target=cast.default)]
    assert own == [False, True]


@pytest.mark.parametrize("kind", ["alone", "read before", "a result", "read after", "too small"])
def test_a_product_is_added_in_the_memory_of_what_nobody_else_reads(kind: str) -> None:
    size = 16 if kind == "too small" else 300
    a, b = (torch.linspace(-1.0, 1.0, size * 8).view(size, 8) * k for k in (1.0, 0.5))

    def fn(a: Tensor, b: Tensor) -> list[Tensor]:
        first = a @ a.mT
        more = {"read before": [torch.tanh(first)], "a result": [first]}.get(kind, [])
        total = first + b @ b.mT
        if kind == "read after":
            total = torch.tanh(total.mT) + 1
        return [total, *more]

    found = traced(fn, [a, b])
    program, _ = lowering.lower(fx.GraphModule({}, found.graph), found.mode, "inference")
    for got, want in zip(program([a, b]), fn(a, b), strict=True):
        torch.testing.assert_close(got, want)
    if kind in ("alone", "a result"):
        held = peak_bytes(lambda: program([a, b]))
        assert held == 4 * size * size * (1 if kind == "alone" else 2)


def joint(fn: Any, inputs: list[Tensor]) -> tracing.Traced:
    """Trace a number and its gradients, for the partitioner."""

    def both(mode: Any, *xs: Tensor) -> Any:
        leaves = [x.detach().requires_grad_() for x in xs]
        with torch.enable_grad():
            value = fn(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves, mode.tangent(value))], []

    return tracing.trace(both, inputs)


def test_what_is_there_anyway_is_kept_at_no_cost() -> None:
    """The weights, and no view of them, which is a tensor of its own to who counts memory."""

    def fn(x: Tensor, w: Tensor) -> Tensor:
        return torch.sum(torch.tanh(torch.tanh(x @ w.mT) @ w.mT) ** 2)

    found = joint(fn, [torch.ones(8, 4), torch.ones(4, 4)])
    forward, _ = lowering.partition(found.graph, found.mode, 1, lasting=[0, 1], lean=False, budget=1.0)
    weights = forward.graph.find_nodes(op="placeholder")[1]
    kept = forward.graph.output_node().args[0][1:]
    assert weights in kept
    assert not [node for node in kept if node is not weights and tracing.base_of(node) is weights]


def test_weights_of_a_convolution_are_kept_as_the_forward_program_lays_them_out() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        return torch.sum(torch.relu(torch.nn.functional.conv2d(x, w)) ** 2)

    found = joint(fn, [torch.ones(2, 3, 8, 8), torch.ones(4, 3, 3, 3)])
    forward, backward = lowering.partition(found.graph, found.mode, 1, lasting=[0, 1], lean=False, budget=1.0)
    named = [str(node) for node in backward.graph.find_nodes(op="placeholder")]
    kept = lowering.pass_inputs_by(forward, 1)
    of_input = {name: by_input for name, (by_input, _) in zip(named, kept, strict=False)}
    assert of_input["primals_2"] is False  # a result: laid out once, for both passes


@pytest.mark.parametrize("inside", [False, True])
def test_gradients_lie_as_their_leaves_do(inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update goes through a leaf and its gradient in one loop; torch's convolution lays it out in its own way."""

    def fn(w: Tensor, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)  # channels last

        def block(w: Tensor, x: Tensor) -> Tensor:
            return torch.nn.functional.conv2d(x, w, padding=1)

        return torch.sum((ft.nn.stack(block, [w], x) if inside else block(w, x)) ** 2)

    cut(monkeypatch)
    w, x = torch.linspace(-1.0, 1.0, 144).view(4, 4, 3, 3), torch.linspace(0.0, 1.0, 512).view(2, 8, 8, 4)
    grad = ft.compile(ft.grad(fn))(w, x)
    assert grad.is_contiguous()
    # float32 sums of a few hundred products in another order
    torch.testing.assert_close(grad, ft.grad(fn)(w, x), rtol=1e-4, atol=1e-3)
