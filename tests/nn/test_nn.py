"""Laws of functrain.nn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import functrain as ft
from functrain import nn, random
from functrain.compiler import compilation
from functrain.nn.fused import fused_attention

law = settings(deadline=None, derandomize=True, max_examples=25)


def draw(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


# ---- layers -------------------------------------------------------------------------------------------------------


@law
@given(seed=st.integers(0, 10**6), leading=st.lists(st.integers(1, 3), max_size=2), biased=st.booleans())
def test_layers_equal_torch(seed: int, leading: list[int], biased: bool) -> None:
    x, weight, bias, scale, shift = draw(seed, (*leading, 5), (5, 7), (7,), (5,), (5,))
    # the same few float64 operations in another order
    close = {"rtol": 1e-13, "atol": 1e-13}
    got = nn.linear(x, weight, bias if biased else None)
    torch.testing.assert_close(got, F.linear(x, weight.T, bias if biased else None), **close)
    got = nn.layer_norm(x, scale, shift if biased else None, eps=1e-3)
    torch.testing.assert_close(got, F.layer_norm(x, (5,), scale, shift if biased else None, 1e-3), **close)
    torch.testing.assert_close(nn.rms_norm(x, scale, eps=1e-3), F.rms_norm(x, (5,), scale, 1e-3), **close)
    torch.testing.assert_close(nn.gelu(x), torch.nn.GELU("tanh")(x), **close)


def test_embedding_takes_rows_and_refuses_what_names_none() -> None:
    (weight,) = draw(0, (4, 3))
    assert torch.equal(nn.embedding(torch.tensor([[3, 0]]), weight), weight[[3, 0]][None])
    for token in (4, -1):
        with pytest.raises(IndexError):
            nn.embedding(torch.tensor([token]), weight)


def test_rms_norm_computes_in_float32() -> None:
    x = draw(1, (8, 300))[0].to(torch.bfloat16)
    wide = nn.rms_norm(x.float(), torch.ones(300))
    assert torch.equal(nn.rms_norm(x, torch.ones_like(x[0])), wide.to(torch.bfloat16))


# ---- dropout ------------------------------------------------------------------------------------------------------


@law
@given(seed=st.integers(0, 2**31), rate=st.sampled_from([0.1, 0.25, 0.5, 0.9]))
def test_dropout_zeroes_at_its_rate_and_keeps_the_mean(seed: int, rate: float) -> None:
    key, n = random.key(seed), 20_000
    y = nn.dropout(torch.ones(n), rate, key)
    assert torch.equal(y.unique(), torch.tensor([0.0, 1.0 / (1.0 - rate)]))
    # five standard deviations of a binomial proportion
    assert abs((y == 0).double().mean() - rate) < 5 * math.sqrt(rate * (1 - rate) / n)
    assert torch.equal(y, nn.dropout(torch.ones(n), rate, key))
    assert not torch.equal(y, nn.dropout(torch.ones(n), rate, random.fold_in(key, 1)))


def test_dropout_without_a_key_or_a_rate_is_the_identity() -> None:
    (x,) = draw(1, (3, 4))
    assert nn.dropout(x, 0.5, None) is x and nn.dropout(x, 0.0, random.key(0)) is x
    for rate in (-0.1, 1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="rate in \\[0, 1\\)"):
            nn.dropout(x, rate, None)


def test_dropout_is_the_same_compiled_mapped_and_differentiated() -> None:
    (x,) = draw(2, (3, 8))
    keys = random.split(random.key(5), 3)
    alone = torch.stack([nn.dropout(row, 0.5, key) for row, key in zip(x, keys, strict=True)])
    assert torch.equal(vmap(lambda row, key: nn.dropout(row, 0.5, key))(x, keys), alone)
    compiled = torch.compile(lambda x, key: nn.dropout(x, 0.5, key), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x[0], keys[0]), alone[0])
    slope = grad(lambda x: nn.dropout(x, 0.5, keys[0]).sum())(x[0])
    assert torch.equal(slope, nn.dropout(torch.ones_like(x[0]), 0.5, keys[0]))


# ---- attention ----------------------------------------------------------------------------------------------------

Q, K, V, DIRECTION = draw(3, *[(2, 3, 6, 4)] * 4)  # (B, H, T, K)


def math_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.attention(q, k, v, nn.causal_mask(q.shape[-2]), implementation="math")


def fused_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.attention(q, k, v, causal=True)


def test_attention_equals_the_fused_one_in_value_and_gradient() -> None:
    # float64 softmaxes of six scores
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(math_attention(Q, K, V), fused_causal(Q, K, V), **close)

    def gradients(f: object) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (Q, K, V)]
        return torch.autograd.grad((f(*leaves) * DIRECTION).sum(), leaves)

    torch.testing.assert_close(gradients(math_attention), gradients(fused_causal), **close)


def test_attention_equals_its_formula() -> None:
    mask = torch.tensor([[True, False, True], [True, True, True]])
    q, k, v = draw(4, (1, 1, 2, 4), (1, 1, 3, 4), (1, 1, 3, 4))
    got = nn.attention(q, k, v, mask)
    for t in range(2):
        weights = torch.stack([torch.exp(q[0, 0, t] @ k[0, 0, s] / 2) * mask[t, s] for s in range(3)])
        # three terms of order 1
        torch.testing.assert_close(got[0, 0, t], weights @ v[0, 0] / weights.sum(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_takes_its_softmax_in_float32_and_products_in_its_dtype(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in (Q, K, V))
    scores = ((q / 2) @ k.mT).float().masked_fill(~nn.causal_mask(6), -torch.inf)
    assert torch.equal(math_attention(q, k, v), torch.softmax(scores, -1).to(dtype) @ v)


@pytest.mark.parametrize("f", [math_attention, fused_causal])
def test_a_query_does_not_see_what_follows(f: object) -> None:
    k, v = K.clone(), V.clone()
    k[:, :, 4:], v[:, :, 4:] = 7.0, math.e
    changed = f(Q, k, v)
    assert torch.equal(changed[:, :, :4], f(Q, K, V)[:, :, :4])
    assert not torch.isclose(changed[:, :, 4:], f(Q, K, V)[:, :, 4:]).any()


def test_attention_has_what_the_fused_one_lacks() -> None:
    def energy(f: object, q: Tensor) -> Tensor:
        return (f(q, K, V) * DIRECTION).sum()

    def curvature(f: object) -> Tensor:
        return grad(lambda q: (grad(lambda q: energy(f, q))(q) * DIRECTION).sum())(Q)

    # the Hessian is symmetric: forward over reverse equals reverse over reverse; float64 sums of a few hundred terms
    forward = jvp(grad(lambda q: energy(math_attention, q)), (Q,), (DIRECTION,))[1]
    torch.testing.assert_close(curvature(math_attention), forward, rtol=1e-12, atol=1e-12)
    mapped = vmap(math_attention)(Q[:, None], K[:, None], V[:, None])[:, 0]
    torch.testing.assert_close(mapped, math_attention(Q, K, V), rtol=1e-12, atol=1e-12)

    # torch's kernel has neither second derivatives nor a forward mode, and is left out where transforms want them
    fused = fused_causal
    torch.testing.assert_close(curvature(fused), forward, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(curvature(ft.recompute(fused)), forward, rtol=1e-12, atol=1e-12)
    moved = [jvp(lambda q, f=f: energy(f, q), (Q,), (DIRECTION,))[1] for f in (fused, math_attention)]
    torch.testing.assert_close(*moved, rtol=1e-12, atol=1e-12)
    mean = lambda f: lambda p, batch, key: torch.sum(f(p["q"], K, V) ** 2)  # noqa: E731
    products = [ft.hvp(mean(f), {"q": Q}, {}, {"q": DIRECTION}) for f in (fused, math_attention)]
    torch.testing.assert_close(products[0]["q"], products[1]["q"], rtol=1e-12, atol=1e-12)
    by_kernel: list[str] = []

    def watched(q: Tensor) -> Tensor:
        by_kernel.append(str(fused(q, K, V).grad_fn))
        return energy(fused, q)

    ft.grad(watched)(Q)
    assert "Scaled" in by_kernel[0], "first derivatives are the kernel's"


def formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + (mask if mask.is_floating_point() else torch.where(mask, 0.0, -torch.inf))
    return torch.softmax(scores, -1) @ v


# of L lanes, B rows, H heads, T queries, S keys, K wide; and which of q, k, v and the mask have lanes of their own
MAPPED = {
    "all": ("bhtk bhsk -", "lll-"),
    "one head": ("htk hsk -", "lll-"),
    "no head": ("tk sk -", "lll-"),
    "shared queries": ("bhtk bhsk -", ".ll-"),
    "shared keys and values": ("bhtk bhsk -", "l..-"),
    "keys of one row": ("bhtk 1hsk -", "lll-"),
    "a shared mask": ("bhtk bhsk ts", "lll."),
    "a mask of each lane": ("bhtk bhsk ts", "llll"),
    "a mask of each row": ("bhtk bhsk b1ts", "lll."),
    "padding": ("bhtk bhsk b1ts", "llll"),
    "only masks": ("bhtk bhsk 1hts", "...l"),
    "a mask of all": ("bhtk bhsk bhts", ".lll"),
}


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("name", MAPPED)
def test_lanes_of_fused_attention_are_rows_of_its_batch(name: str, boolean: bool) -> None:
    shapes, mapped = MAPPED[name]
    sizes = {"l": 3, "b": 2, "h": 2, "t": 4, "s": 5, "k": 3, "1": 1}
    q_shape, k_shape, mask_shape = [tuple(sizes[c] for c in s if c != "-") for s in shapes.split()]
    tensors: list[Tensor | None] = [
        draw(i, ((3,) if lanes == "l" else ()) + shape)[0] if shape else None
        for i, (shape, lanes) in enumerate(zip((q_shape, k_shape, k_shape, mask_shape), mapped, strict=True))
    ]
    if boolean and tensors[3] is not None:
        tensors[3] = (tensors[3] > 0) | (torch.arange(5) == 0)  # each query sees a key
    chosen = tuple(i for i, t in enumerate(tensors) if t is not None and t.is_floating_point())
    dims = tuple(0 if lanes == "l" else None for lanes in mapped)

    def found(f: Callable[..., Tensor]) -> tuple[Any, ...]:
        energy = lambda *args: torch.sum(torch.sin(f(*args)))  # noqa: E731
        each = vmap(grad(energy, argnums=chosen), in_dims=dims)(*tensors)
        whole = grad(lambda *args: torch.sum(vmap(energy, in_dims=dims)(*args)), argnums=chosen)(*tensors)
        return vmap(f, in_dims=dims)(*tensors), each, whole

    # sums of a few dozen numbers of about 1
    torch.testing.assert_close(found(fused_attention), found(formula), rtol=1e-12, atol=1e-12)


def test_maps_of_maps_of_fused_attention_are_one_call_of_the_kernel() -> None:
    shapes = (2, 3, 1, 2, 4, 3), (3, 1, 2, 5, 3), (2, 1, 2, 5, 3)
    q, k, v = (draw(i, shape)[0] for i, shape in enumerate(shapes))
    calls: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.extend([str(func)] if "flash_attention" in str(func) else [])
            return func(*args, **(kwargs or {}))

    def found(f: Callable[..., Tensor]) -> Any:
        gradients = ft.grad(lambda q, k, v: torch.sum(f(q, k, v, None) ** 2), argnums=(0, 1, 2))
        return ft.vmap(ft.vmap(gradients, (0, 0, None)), (0, None, 0))(q, k, v)

    with Watch():
        ours = found(fused_attention)
    torch.testing.assert_close(ours, found(formula), rtol=1e-12, atol=1e-12)
    assert len(calls) == 3 and sum("backward" in call for call in calls) == 1
    with pytest.raises(NotImplementedError, match="no second derivative"):
        total = torch.sum(ft.vmap(lambda q: fused_attention(q, q, q) ** 2)(leaf := q.clone().requires_grad_()))
        torch.autograd.grad(torch.autograd.grad(total, leaf, create_graph=True)[0].sum(), leaf)


def test_the_gradient_of_fused_attention_may_stand_in_a_loss_compiled_in_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def learned(params: object, batch: object, key: object) -> ft.Loss:
        energy = lambda q: torch.sum(fused_causal(q, batch["k"], batch["v"]) ** 2)  # noqa: E731
        return ft.Loss(torch.sum(ft.grad(energy)(params["q"]) ** 2), torch.ones((), dtype=torch.float64), {})

    monkeypatch.setattr(compilation, "_PIECEWISE_BYTES", 0)
    tx = ft.optim.sgd(0.1)
    state, step = ft.init_state({"q": Q}, tx, key=random.key(0)), ft.train_step(learned, tx)
    batch = {"k": K, "v": V}
    torch.testing.assert_close(ft.compile(step)(state, batch)[0].params, step(state, batch)[0].params)


def test_attention_drops_weights_by_a_key() -> None:
    key = random.key(3)
    values = torch.eye(6, dtype=torch.float64).expand(2, 3, 6, 6)
    whole = math_attention(Q, K, values)  # the weights themselves
    dropped = nn.attention(Q, K, values, nn.causal_mask(6), dropout_rate=0.5, key=key)
    assert torch.equal(dropped, nn.dropout(whole, 0.5, key))
    kept = nn.attention(Q, K, values, nn.causal_mask(6), dropout_rate=0.5, implementation="math")
    assert torch.equal(kept, whole)
