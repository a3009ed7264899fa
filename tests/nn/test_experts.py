"""Laws of a mixture of experts; transformers' Mixtral and Qwen3-MoE are the witnesses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import functrain as ft
from functrain import nn, random, tree
from functrain.losses import expert_load, load_balancing
from functrain.nn.grouped import grouped_product


def draw(seed: int, count: int = 4, width: int = 6, inner: int = 5, dtype: torch.dtype = torch.float64) -> Any:
    shapes = {"router": (width, count), "gate": (count, width, inner), "up": (count, width, inner)}
    shapes["down"] = (count, inner, width)
    keys = random.split(random.key(seed), len(shapes))
    return {n: random.normal(k, shape, dtype) for k, (n, shape) in zip(keys, shapes.items(), strict=True)}


def tokens_of(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return random.normal(random.key(seed + 100), shape, dtype)


def one_token_at_a_time(params: Any, x: Tensor, per_token: int, normalized: bool) -> Tensor:
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        weights, chosen = torch.topk(torch.softmax(row @ params["router"], -1), per_token)
        weights = weights / weights.sum() if normalized else weights
        made = [
            torch.nn.functional.silu(row @ params["gate"][e]) * (row @ params["up"][e]) @ params["down"][e]
            for e in chosen
        ]
        rows.append(sum(w * y for w, y in zip(weights, made, strict=True)))
    return torch.stack(rows).reshape(x.shape)


@settings(deadline=None, derandomize=True, max_examples=15)
@given(
    seed=st.integers(0, 10**6), count=st.integers(1, 5), data=st.data(), normalized=st.booleans(),
    inner=st.sampled_from([4, 5, 8]),
)  # fmt: skip
def test_a_token_is_the_sum_of_its_experts_in_value_and_gradient(
    seed: int, count: int, data: st.DataObject, normalized: bool, inner: int
) -> None:
    per_token = data.draw(st.integers(1, count))
    params, x = draw(seed, count, 8, inner), tokens_of(seed, 2, 3, 8)
    energy = lambda f: lambda params, x: torch.sum(torch.sin(f(params, x)))  # noqa: E731
    ours = lambda params, x: nn.experts(x, **params, per_token=per_token, normalized=normalized)[0]  # noqa: E731
    loop = lambda params, x: one_token_at_a_time(params, x, per_token, normalized)  # noqa: E731
    # float64 sums of a few dozen terms
    torch.testing.assert_close(ours(params, x), loop(params, x), rtol=1e-11, atol=1e-11)
    found, wanted = (ft.grad(energy(f), argnums=(0, 1))(params, x) for f in (ours, loop))
    assert tree.allclose(found, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("inner", [16, 5])
def test_the_kernel_and_the_loop_give_the_product_of_each_group(dtype: torch.dtype, inner: int) -> None:
    x, weight = tokens_of(0, 10, 8, dtype=dtype), draw(1, 4, 8, inner, dtype)["gate"]
    ends = torch.tensor([3, 3, 7, 10], dtype=torch.int32)  # one group has no rows
    wanted = torch.cat([x[a:b] @ weight[e] for e, (a, b) in enumerate([(0, 3), (3, 3), (3, 7), (7, 10)])])
    close: dict[str, float] = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(grouped_product(x, weight, ends), wanted, **close)
    slopes = grad(lambda x, w: torch.sum(torch.sin(grouped_product(x, w, ends).double())), argnums=(0, 1))(x, weight)
    assert torch.equal(slopes[1][1], torch.zeros_like(slopes[1][1])) and slopes[0].any(-1).all()


def test_products_of_groups_have_derivatives_of_any_order() -> None:
    x, weight = (t.requires_grad_() for t in (tokens_of(0, 3, 2), draw(1, 3, 2, 2)["gate"]))
    ends = torch.tensor([2, 2, 3], dtype=torch.int32)
    assert torch.autograd.gradgradcheck(lambda x, w: grouped_product(x, w, ends), (x, weight))


def test_the_formula_where_transforms_want_more_equals_the_products() -> None:
    params, x, direction = draw(2), tokens_of(2, 5, 6), tokens_of(3, 5, 6)

    def energy(x: Tensor) -> Tensor:
        return torch.sum(torch.sin(nn.experts(x, **params, per_token=2)[0]))

    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(energy(leaf), leaf, create_graph=True)
    (wanted,) = torch.autograd.grad(torch.sum(slope * direction), leaf)
    twice = grad(lambda x: torch.sum(grad(energy)(x) * direction))(x)
    forward = jvp(grad(energy), (x,), (direction,))[1]
    torch.testing.assert_close((twice, forward), (wanted, wanted), rtol=1e-11, atol=1e-11)


def test_a_lane_of_a_map_equals_itself_alone_without_a_warning() -> None:
    params = [draw(seed) for seed in range(3)]
    stacked, x = tree.map(lambda *leaves: torch.stack(leaves), *params), tokens_of(4, 3, 5, 6)
    slope = grad(lambda p, x: torch.sum(torch.sin(nn.experts(x, **p, per_token=2)[0])), argnums=(0, 1))
    alone = tree.map(lambda *leaves: torch.stack(leaves), *[slope(p, row) for p, row in zip(params, x, strict=True)])
    assert tree.allclose(vmap(slope)(stacked, x), alone, rtol=1e-11, atol=1e-11)
    shared = tree.map(lambda *leaves: torch.stack(leaves), *[slope(params[0], row) for row in x])
    assert tree.allclose(vmap(slope, (None, 0))(params[0], x), shared, rtol=1e-11, atol=1e-11)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(seed=st.integers(0, 10**6), per_token=st.integers(1, 4), padded=st.booleans(), layers=st.integers(1, 3))
def test_the_balancing_loss_is_that_of_transformers_and_padding_has_no_say(
    seed: int, per_token: int, padded: bool, layers: int
) -> None:
    logits = random.normal(random.key(seed), (layers, 2, 5, 4))
    mask = random.randint(random.key(seed + 1), (2, 5), 0, 3) > 0 if padded else torch.ones(2, 5, dtype=torch.bool)
    mask[0, 0] = True

    def ours(logits: Tensor) -> Tensor:
        loads = []
        for layer in logits:
            probabilities = torch.softmax(layer, -1)
            loads.append(expert_load(probabilities, torch.topk(probabilities, per_token).indices, mask))
        loss = load_balancing(tree.map(lambda *parts: sum(parts), *loads))
        assert loss.weight == layers * mask.sum()
        return loss.total / loss.weight

    def theirs(logits: Tensor) -> Any:
        return load_balancing_loss_func(tuple(logits.reshape(layers, 10, 4)), 4, per_token, mask.long())

    # float32 sums of 30 probabilities
    torch.testing.assert_close(ours(logits), theirs(logits), rtol=1e-5, atol=1e-6)
    found, wanted = grad(ours)(logits), grad(theirs)(logits)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert not found[:, ~mask].any()


def test_the_load_is_of_the_tokens_that_the_mask_keeps() -> None:
    params, x = draw(5), tokens_of(5, 2, 4, 6)
    mask = torch.tensor([[True, True, False, False], [True, False, True, True]])
    y, load = nn.experts(x, **params, per_token=2, mask=mask)
    kept, without = nn.experts(x[mask], **params, per_token=2)
    assert tree.allclose(load, without) and load.tokens == 5 and load.chosen.sum() == 10
    torch.testing.assert_close(y[mask], kept, rtol=1e-11, atol=1e-11)


def test_compiled_equals_eager() -> None:
    params, x = draw(6), tokens_of(6, 4, 6)
    torch._dynamo.reset()
    f = lambda p, x: nn.experts(x, **p, per_token=2)  # noqa: E731
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert tree.allclose(compiled(params, x), f(params, x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"per_token": 5}, "per_token from 1 to the 4 experts, came 5"),
        ({"router": torch.zeros(6, 3)}, r"router \(6, 4\) beside x \(2, 6\) and gate \(4, 6, 5\), came \(6, 3\)"),
        ({"down": torch.zeros(4, 6, 5)}, r"down \(4, 5, 6\).*came \(4, 6, 5\)"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"a mask of the tokens \(2,\), came \(3,\)"),
    ],
)
def test_what_does_not_fit_is_told(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        nn.experts(torch.zeros(2, 6), **(draw(7, dtype=torch.float32) | {"per_token": 2} | change))


@pytest.mark.parametrize(("policy", "products"), [("nothing", 7), ("dots", 4)])
def test_recompute_keeps_products_of_experts_as_it_keeps_others(policy: str, products: int) -> None:
    params, x = draw(3), tokens_of(3, 5, 6)
    seen: list[str] = []

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    def loss(params: Any) -> Tensor:
        return torch.sin(nn.experts(x, **params, per_token=2)[0]).sum()

    with Operations():
        found = ft.grad(ft.recompute(loss, policy))(params)
    # three forward, one for the gradient by what "down" is given, and without "dots" three that are computed again
    assert seen.count("functrain.grouped_product.default") == products
    assert all(map(torch.equal, tree.leaves(found), tree.leaves(ft.grad(loss)(params))))
