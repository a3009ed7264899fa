"""Laws of the two gradient engines, and of what they believe about torch."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import functrain as ft
from functrain.compiler import engine

X = torch.arange(1.0, 4.0, dtype=torch.float64)


@pytest.fixture(autouse=True)
def found_as_left() -> Iterator[None]:
    defaults = {field.name: field.default for field in dataclasses.fields(engine.Here)}
    assert vars(engine.here) == defaults
    yield
    assert vars(engine.here) == defaults
    assert torch.is_grad_enabled()


def cube(x: Tensor) -> Tensor:
    return torch.sum(x**3)


def test_the_probe_sees_the_callers_transforms() -> None:
    # the private name that engine.nested calls: None outside, something inside every transform of torch.func
    peek = torch._C._functorch.peek_interpreter_stack
    seen: list[bool] = []

    def fn(x: Tensor) -> Tensor:
        seen.append(peek() is not None and engine.nested())
        return torch.sum(x)

    assert peek() is None and not engine.nested()
    torch.func.vmap(fn)(X[None])
    torch.func.grad(fn)(X)
    torch.func.vjp(fn, X)
    torch.func.jvp(fn, (X,), (X,))
    torch.func.functionalize(fn)(X)
    torch.func.jacrev(fn)(X)
    assert len(seen) == 6 and all(seen)
    assert peek() is None and not engine.nested()


def test_without_the_probe_torchs_vmap_would_not_be_noticed() -> None:
    assert engine.here.depth == 0
    depths: list[int] = []
    torch.func.vmap(lambda x: depths.append(engine.here.depth) or x)(X)
    assert depths == [0]


def test_transforms_count_their_depth() -> None:
    depths: list[int] = []

    def fn(x: Tensor) -> Tensor:
        depths.append(engine.here.depth)
        return torch.sum(x**3)

    ft.grad(fn)(X)
    ft.vmap(fn)(X[None])
    ft.grad(lambda x: torch.sum(ft.grad(fn)(x)))(X)
    ft.vmap(ft.grad(fn))(X[None])
    assert depths == [1, 1, 2, 2]


def test_outermost_runs_plain_autograd_and_nested_runs_torch_func() -> None:
    peek = torch._C._functorch.peek_interpreter_stack
    by_functorch: list[bool] = []

    def fn(x: Tensor) -> Tensor:
        by_functorch.append(peek() is not None)
        return torch.sum(x**3)

    ft.grad(fn)(X)
    with torch.no_grad():
        ft.grad(fn)(X.clone().requires_grad_())
    assert by_functorch == [False, False]
    ft.grad(fn)(X.clone().requires_grad_())
    ft.grad(lambda x: torch.sum(ft.grad(fn)(x)))(X)
    torch.func.vmap(ft.grad(fn))(X[None])
    assert by_functorch[2:] == [True, True, True]


def _fail(x: Tensor) -> Tensor:
    raise RuntimeError("in fn")


FAILING: dict[str, tuple[Callable[[], Any], type[Exception]]] = {
    "outermost": (lambda: ft.grad(_fail)(X), RuntimeError),
    "vmap": (lambda: ft.vmap(_fail)(X), RuntimeError),
    "nested": (lambda: ft.grad(lambda x: torch.sum(ft.grad(_fail)(x)))(X), RuntimeError),
    "vmap of grad": (lambda: ft.vmap(ft.grad(_fail))(X[None]), RuntimeError),
    "from outside": (lambda: ft.grad(_fail)(X.clone().requires_grad_()), RuntimeError),
    "no scalar": (lambda: ft.grad(lambda x: x)(X), TypeError),
    "no scalar, nested": (lambda: ft.vmap(ft.grad(lambda x: x))(X[None]), TypeError),
    "detached": (lambda: ft.grad(lambda x: torch.sum(x.detach()))(X), ValueError),
}


@pytest.mark.parametrize("case", FAILING)
def test_an_error_leaves_the_engine_as_it_was(case: str) -> None:
    call, error = FAILING[case]
    with pytest.raises(error):
        call()
    assert engine.here.depth == 0 and not engine.nested()
    assert torch.equal(ft.grad(cube)(X), 3 * X**2)


def test_fields_are_put_back_in_any_case_and_known() -> None:
    with pytest.raises(ZeroDivisionError), engine.entered(lean=True, depth=3):
        with engine.deeper():
            assert (engine.here.depth, engine.here.lean) == (4, True)
        assert engine.here.depth == 3
        raise ZeroDivisionError
    with pytest.raises(AssertionError, match="no field \\['deep'\\]"):
        engine.entered(deep=1)


def test_transforms_in_other_threads_are_not_ours() -> None:
    # a data set that maps in the loader's thread, beside a compiled step
    entered, leave, found = threading.Event(), threading.Event(), []

    def beside(x: Tensor) -> Tensor:
        entered.set()
        leave.wait(60)
        return x

    def again(call: Callable[[], Any]) -> None:
        found.append(call())

    thread = threading.Thread(target=lambda: ft.vmap(beside)(X[None]))
    thread.start()
    entered.wait(60)
    assert not engine.nested() and engine.here.depth == 0
    leave.set()
    thread.join()
    # but a backward pass, which an accelerator runs in a thread of its own, runs a function again as it was run first
    deep: list[Callable[[], Any]] = []

    def run(x: Tensor) -> Tensor:
        deep.append(engine.as_here(lambda: (engine.here.depth, engine.here.layers[0])))
        return torch.sum(x)

    engine.running(ft.grad(run), layers=(0.5, "dots", ()))(X)
    thread = threading.Thread(target=again, args=deep)
    thread.start()
    thread.join()
    assert found == [(1, 0.5)]


def test_contexts_are_left_after_an_error() -> None:
    for context, names in ((engine.repeating, ["repeats", "lean"]), (engine.tracing_operations, ["tracing"])):
        with pytest.raises(RuntimeError, match="in the block"), context():
            with context():
                pass
            assert all(getattr(engine.here, name) for name in names)
            raise RuntimeError("in the block")
        assert not any(getattr(engine.here, name) for name in names)


def test_code_that_asks_torch_whether_it_is_compiled_hears_yes_while_it_is_traced() -> None:
    # transformers looks at the numbers in a mask otherwise
    with engine.tracing_operations():
        assert torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
    assert not torch.compiler.is_compiling()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_function_runs_with_grad_enabled_and_the_mode_is_put_back(enabled: bool) -> None:
    modes: list[bool] = []

    def fn(x: Tensor) -> Tensor:
        modes.append(torch.is_grad_enabled())
        return torch.sum(x**3)

    with torch.set_grad_enabled(enabled):
        value, grads = ft.value_and_grad(fn)(X)
        assert torch.is_grad_enabled() is enabled
    assert modes == [True] and not value.requires_grad and not grads.requires_grad


@pytest.mark.parametrize("transform", ["forward", "reverse", "mixed"])
def test_torchs_transforms_around_ours_are_right(transform: str) -> None:
    hessian = {
        "forward": torch.func.jacfwd(ft.grad(cube)),
        "reverse": torch.func.jacrev(ft.grad(cube)),
        "mixed": torch.func.vmap(lambda v: torch.func.jvp(ft.grad(cube), (X,), (v,))[1]),
    }[transform]
    got = hessian(torch.eye(3, dtype=torch.float64) if transform == "mixed" else X)
    # 6 * x: two products, each rounded by 2**-53
    torch.testing.assert_close(got, torch.diag(6 * X), rtol=1e-15, atol=1e-14)
