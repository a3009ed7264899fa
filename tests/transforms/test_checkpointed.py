"""Recompute in eager, outermost: saved tensors are numbers until a second run makes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from memory import peak_bytes
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import functrain as ft
from functrain.transforms import checkpointed

Layer = Callable[[Tensor, Tensor], Tensor]
recomputed = ft.recompute


def draw(seed: int, *shape: int) -> Tensor:
    return ft.random.normal(ft.random.key(seed), shape, dtype=torch.float64).requires_grad_()


W, X = draw(0, 4, 4), draw(1, 3, 4)


def grads(fn: Layer, **options: bool) -> tuple[Tensor, ...]:
    return torch.autograd.grad(fn(W, X).sum(), (W, X), **options)


def layer(w: Tensor, x: Tensor) -> Tensor:
    return torch.sin(torch.exp(torch.tanh(x @ w)))


def twice(fn: Layer) -> Layer:
    return lambda w, x: fn(w, fn(w, x)) * 2


def assert_close(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> None:
    for found, wanted in zip(a, b, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)  # w's gradients are added in another order


def in_torchs(fn: Layer) -> Layer:
    return lambda w, x: checkpoint(fn, w, x, use_reentrant=False)


@pytest.mark.parametrize("inner", [recomputed, in_torchs])
@pytest.mark.parametrize("outer", [recomputed, in_torchs, lambda fn: recomputed(in_torchs(recomputed(fn)))])
def test_inside_of_itself_and_of_torchs(inner: Callable[[Layer], Layer], outer: Callable[[Layer], Layer]) -> None:
    assert_close(grads(outer(twice(inner(twice(layer))))), grads(twice(twice(layer))))


def test_the_graph_is_read_as_often_as_one_likes_and_differentiated() -> None:
    fn, plain = recomputed(twice(recomputed(layer))), twice(layer)
    value = fn(W, X).sum()
    for keep in (True, True, False):
        assert_close(torch.autograd.grad(value, (W, X), retain_graph=keep), grads(plain))
    second = [
        torch.autograd.grad(sum(torch.sum(g**2) for g in grads(f, create_graph=True)), (W, X)) for f in (fn, plain)
    ]
    assert_close(*second)
    # a part of it now, the same part once more, the rest later
    pair = recomputed(lambda w, x: (layer(w, x), torch.sin(x)))(W, X)
    for _ in range(2):
        assert_close(torch.autograd.grad(pair[0].sum(), (W, X), retain_graph=True), grads(layer))
    assert torch.equal(torch.autograd.grad(pair[1].sum(), X)[0], torch.cos(X))


def test_a_function_that_differentiates_by_torch_autograd() -> None:
    def penalty(w: Tensor, x: Tensor) -> Tensor:
        h = torch.tanh(x @ w)
        (slope,) = torch.autograd.grad(h.sum(), x, create_graph=True)
        return torch.sum(slope**2) + h.sum()

    assert all(torch.equal(a, b) for a, b in zip(grads(recomputed(penalty)), grads(penalty), strict=True))
    both = draw(2, 2, 4, 4)  # two arguments of one node, which must not be differentiated because the other one is
    value, wanted = [fn(*both.unbind()) for fn in (recomputed(penalty), penalty)]
    assert torch.equal(*[torch.autograd.grad(v, both)[0] for v in (value, wanted)])


def test_the_second_run_stops_at_the_last_value_that_is_needed() -> None:
    ran: list[str] = []

    def fn(w: Tensor, x: Tensor) -> Tensor:
        ran.append("begin")
        h = torch.tanh(x @ w)
        ran.append("tanh")
        y = h + 1
        ran.append("end")
        return y

    value = recomputed(fn)(W, X)
    torch.autograd.grad(value.sum(), W)
    assert ran == ["begin", "tanh", "end", "begin"]


def test_a_function_that_catches_exceptions_does_not_catch_ours() -> None:
    ran: list[str] = []

    def careful(w: Tensor, x: Tensor) -> Tensor:
        try:
            h = torch.tanh(x @ w)
        except Exception:
            h = x
        ran.append("on")
        return h

    assert_close(grads(recomputed(careful)), grads(lambda w, x: torch.tanh(x @ w)))
    assert ran == ["on"], "the second run ends where all is there"


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (lambda w, x: (x @ w) * 2, r"expected fn to save torch.float64 \(3, 4\) .* came nothing more"),
        (lambda w, x: torch.tanh(w @ w), r"expected fn to save .* came torch.float64 \(4, 4\)"),
    ],
)
def test_another_second_run_is_an_error(second: Layer, says: str) -> None:
    runs = [lambda w, x: torch.tanh(x @ w), second]
    with pytest.raises(RuntimeError, match=says):
        grads(recomputed(lambda w, x: runs.pop(0)(w, x)))


@pytest.mark.parametrize("save", [torch.sin, torch.exp])  # which save their argument, and their result
def test_writing_over_what_is_saved_is_an_error_as_without(save: Callable[[Tensor], Tensor]) -> None:
    def writes(w: Tensor, x: Tensor) -> Tensor:
        h = x @ w
        y = save(h)
        (h if save is torch.sin else y).mul_(2)
        return torch.sin(y)

    for fn, says in ((writes, "inplace operation"), (recomputed(writes), r"fn writes into .* \(3, 4\) that its back")):
        with pytest.raises(RuntimeError, match=says):
            grads(fn)
    # what nobody saves may be written to
    assert_close(grads(recomputed(lambda w, x: torch.sin((x @ w).mul_(2)))), grads(lambda w, x: torch.sin(x @ w * 2)))


@pytest.mark.parametrize("inner", [lambda fn: fn, recomputed])
def test_what_a_call_keeps_is_its_inputs(inner: Callable[[Layer], Layer]) -> None:
    x = torch.ones(64, 64, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        for _ in range(8):
            x = inner(lambda w, x: torch.tanh(torch.sin(x)))(x, x)
        return x

    def forward() -> None:
        nonlocal value
        value = recomputed(block)(x).sum()

    value = torch.zeros(())
    forward()
    # what lives at most at a time in the second of two losses, and the values of one block; 16 are kept without
    assert peak_bytes(forward) <= 4 * x.nbytes
    torch.autograd.grad(value, x)


def test_nothing_differentiated_is_no_graph() -> None:
    assert not recomputed(layer)(W.detach(), X.detach()).requires_grad
    with pytest.raises(ValueError, match="no argument"):
        recomputed(lambda x: x @ W)(X.detach())


def test_what_was_made_and_read_is_let_go() -> None:
    saved = checkpointed._Saved(lambda w, x: torch.tanh(x @ w), checkpointed._Kept.apply(W, X).grad_fn)
    with torch.autograd.graph.saved_tensors_hooks(saved.number, saved.tensor):
        value = torch.tanh(X @ W)
    saved._run_again()
    assert len(saved.made) == 3 and all(x.grad_fn is None for x in saved.made.values())  # nor the second run's graph
    torch.autograd.grad(value.sum(), (W, X))
    assert not saved.made
