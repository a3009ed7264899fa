"""Updates compiled leaf by leaf: torch's private names do what we think, and alike leaves share a kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx
from torch._functorch import config as functorch_config
from torch._inductor import cpu_vec_isa
from torch._inductor.async_compile import AsyncCompile

import functrain as ft
from functrain.transforms import compiler_jobs, graph_passes, inductor, leafwise
from functrain.transforms.compilation import _Compiled


def update(leaves: list[Tensor], grads: list[Tensor], count: Tensor) -> tuple[list[Tensor], Tensor]:
    norm = torch.sqrt(torch.stack([torch.sum(g * g) for g in grads]).sum())
    scale = 0.1 / (norm + count)
    new = [p - scale * g for p, g in zip(leaves, grads, strict=True)]
    new[-1] = new[-1] @ new[-1]  # a leaf that is no column
    return new, norm


def test_alike_leaves_share_a_kernel_and_the_update_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    compile_for_any_length = inductor.compile_for_any_length
    monkeypatch.setattr(
        inductor, "compile_for_any_length", lambda *args: made.append(args) or compile_for_any_length(*args)
    )
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (7,), (200, 100), (2, 3, 4), (150, 120), (4, 4)]
    leaves, grads = ([torch.randn(s, generator=generator, dtype=torch.float32) for s in shapes] for _ in range(2))
    count = torch.tensor(2.0, dtype=torch.float32)
    new, norm = _Compiled(update, False, leafwise.compile_graph)(leaves, grads, count)
    expected, expected_norm = update(leaves, grads, count)
    # float32 sums of 4e4 squares in another order
    torch.testing.assert_close(new, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm, expected_norm, rtol=1e-5, atol=1e-5)
    assert len({leaf.untyped_storage().data_ptr() for leaf in new}) == len(new)
    assert len(made) == 2, "one kernel for the norms of five leaves, one for their updates"


def test_a_costly_number_is_computed_once_and_not_for_every_element() -> None:
    count, x = torch.tensor(3), torch.linspace(-1.0, 1.0, 100)

    def scaled(count: Tensor, x: Tensor) -> list[Tensor]:
        late = torch.cos(count) > 0.0
        return [x * (1 - 0.9**count), torch.where(late, x, -x), x + 2 * count, 0.5**count]

    def numbers_read_by_lines(graph: fx.Graph) -> set[str]:
        lines = [node for node in graph.nodes if node.op == "call_function" and node.meta["val"].dim() == 1]
        return {str(arg.target) for node in lines for arg in node.all_input_nodes if arg.meta["val"].dim() == 0}

    graph = inductor.trace(scaled, [count, x])
    before = {"aten.rsub.Scalar", "aten.gt.Scalar", "aten.mul.Tensor"}
    assert numbers_read_by_lines(graph.graph) == before
    graph_passes.compute_numbers_once(graph.graph)
    copied = {"aten.rsub.Scalar", "aten.gt.Scalar"}  # only to be copied 16 times; twice a counter is cheap
    assert numbers_read_by_lines(graph.graph) == {"aten.amax.default", "aten.any.default", "aten.mul.Tensor"} | copied
    kernel = inductor.compile_graph(inductor.trace(scaled, [count, x]), [count, x])
    torch.testing.assert_close(kernel(count, x), scaled(count, x), rtol=1e-6, atol=1e-6)  # float32 powers


@pytest.mark.parametrize(("leaves", "product"), [(20, False), (20, True), (2, False)])
def test_a_plain_function_without_matrix_products_is_compiled_leaf_by_leaf(
    monkeypatch: pytest.MonkeyPatch, leaves: int, product: bool
) -> None:
    made: list[bool] = []
    compile_for_any_length = inductor.compile_for_any_length
    monkeypatch.setattr(
        inductor, "compile_for_any_length", lambda *args: made.append(True) or compile_for_any_length(*args)
    )
    square = torch.eye(3, dtype=torch.float32)
    params = [torch.full((2**19 // leaves,), float(i), dtype=torch.float32) for i in range(leaves)]

    def update(params: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        return [p * 0.5 + 1.0 for p in params], square @ square if product else square

    new, _ = ft.compile(update, donate=True)([p.clone() for p in params])
    for a, b in zip(new, params, strict=True):
        assert torch.equal(a, b * 0.5 + 1.0)
    assert made == ([True] if leaves == 20 and not product else [])


def test_a_float64_update_is_compiled_as_an_ordinary_graph() -> None:
    leaves, grads = ([torch.full((3, 3), v, dtype=torch.float64) for _ in range(3)] for v in (1.0, 2.0))
    count = torch.tensor(2.0, dtype=torch.float64)
    new, norm = _Compiled(update, False, leafwise.compile_graph)(leaves, grads, count)
    expected, expected_norm = update(leaves, grads, count)
    torch.testing.assert_close((new, norm), (expected, expected_norm), rtol=1e-12, atol=1e-12)


def test_kernels_of_several_graphs_are_compiled_side_by_side() -> None:
    x, wait = torch.linspace(0.0, 1.0, 40), AsyncCompile.wait
    functions = [lambda v: [torch.sin(v) * 1.25], lambda v: [torch.cos(v) * 1.75]]
    with compiler_jobs.together([x]):
        kernels = [inductor.compile_graph(inductor.trace(f, [x]), [x]) for f in functions]
        if torch._inductor.config.compile_threads > 1:
            for kernel in kernels:
                with pytest.raises(TypeError, match="not callable"):  # nobody has waited for it yet
                    kernel(x)
    assert AsyncCompile.wait is wait
    for kernel, f in zip(kernels, functions, strict=True):
        # a vectorized sine differs from the eager one in the last place
        torch.testing.assert_close(kernel(x), f(x), rtol=1e-6, atol=1e-6)


def test_what_the_cpu_can_do_is_found_out_beside_and_is_what_torch_finds() -> None:
    compiler_jobs.start_checks([torch.ones(1)])
    compiler_jobs.finish_checks()
    checks = compiler_jobs._checks()
    assert all(check.done() for check in checks)
    if checks:  # not asked on an ARM CPU
        assert sum(check.result() for check in checks) == len(cpu_vec_isa.valid_vec_isa_list()) > 0


def test_the_backward_is_compiled_with_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    made, compile_unshared = [], inductor._compile_unshared
    monkeypatch.setattr(inductor, "_compile_unshared", lambda *a, **k: made.append(a) or compile_unshared(*a, **k))
    w = torch.ones(3, requires_grad=True)
    compiled = inductor.compile_differentiable(lambda w: torch.sum(torch.sin(w) * 0.625))
    with functorch_config.patch(enable_autograd_cache=False):  # else torch loads both from disk
        value = compiled(w)
    assert len(made) == 2
    torch.testing.assert_close(torch.autograd.grad(value, w)[0], torch.cos(torch.ones(3)) * 0.625)


def test_any_number_of_losses_and_shapes_is_compiled() -> None:
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1):
        double, triple = (inductor.compile_differentiable(lambda x, n=n: torch.sum(x * n)) for n in (2.0, 3.0))
        assert [float(f(torch.ones(n))) for f, n in [(double, 1), (double, 2), (triple, 2)]] == [2.0, 4.0, 6.0]


def test_keeping_less_for_the_backward_changes_no_gradient() -> None:
    def loss(w: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return torch.sum(torch.nn.functional.gelu(x @ w) @ v)

    w, v, x = torch.linspace(-1, 1, 32).view(4, 8), torch.linspace(1, -1, 16).view(8, 2), torch.ones(64, 4)
    leaves = [w.requires_grad_(), v.requires_grad_()]
    kept, grads = [], []
    for keep_less in (False, True):
        value = inductor.compile_differentiable(loss, keep_less=keep_less)(w, v, x)
        kept.append({t.data_ptr(): t.nbytes for t in value.grad_fn.saved_tensors if t.dim() > 1})
        grads.append(torch.autograd.grad(value, leaves))
    # x @ w, and without keep_less also the activation of it, (64, 8) float32, which the gradient of v multiplies
    assert sum(kept[0].values()) - sum(kept[1].values()) == 64 * 8 * 4
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_view_of_what_the_compiler_lays_out_in_another_way_is_a_copy() -> None:
    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([torch.sin(x), torch.cos(x)], 2)  # (3, 3, 24)
        rows = torch.cat([both.permute(2, 0, 1)], 1)  # of one tensor: a copy in eager alone
        return rows.view(72, 3) + 1, torch.bmm(rows, w)

    inputs = torch.arange(108.0).view(3, 3, 12) / 100, torch.ones(24, 3, 4)
    torch.testing.assert_close(ft.compile(fn)(*inputs), fn(*inputs))
