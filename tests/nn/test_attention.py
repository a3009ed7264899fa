"""Laws of nn.attention: what a query sees, by the kernel and by the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jvp, vmap

import functrain as ft
from functrain import nn, random

BOTH = ["fused", "math"]


def draw(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    keys = random.split(random.key(seed), len(shapes))
    return [random.normal(key, shape, torch.float64) for key, shape in zip(keys, shapes, strict=True)]


def one_query_at_a_time(q: Tensor, k: Tensor, v: Tensor, scale: float | None, **sees: Any) -> Tensor:
    """The definition: for each query the softmax over the list of the keys that it sees."""
    batch, heads, tokens, width = q.shape
    rows = []
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // k.shape[1])
            for t in range(tokens):
                keys = [s for s in range(tokens) if visible(b, t, s, **sees)]
                scores = [(q[b, h, t] @ k[b, g, s]) * (width**-0.5 if scale is None else scale) for s in keys]
                weights = torch.softmax(torch.stack(scores), 0) if keys else []
                terms = [w * v[b, g, s] for w, s in zip(weights, keys, strict=True)]
                rows.append(sum(terms, torch.zeros_like(v[b, g, 0])))
    return torch.stack(rows).view(batch, heads, tokens, -1)


def visible(
    b: int, t: int, s: int, *, mask: Any = None, causal: Any = False, window: Any = None, documents: Any = None,
    key_mask: Any = None,
) -> bool:  # fmt: skip
    return bool(
        (mask is None or mask[t, s])
        and (not causal or s <= t)
        and (window is None or abs(t - s) < window)
        and (documents is None or documents[b, t] == documents[b, s])
        and (key_mask is None or key_mask[b, s])
    )


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    seed=st.integers(0, 10**6), causal=st.booleans(), window=st.sampled_from([None, 1, 2, 3, 9]),
    packed=st.booleans(), padded=st.booleans(), masked=st.booleans(), groups=st.sampled_from([1, 2, 4]),
    scale=st.sampled_from([None, 0.3]),
)  # fmt: skip
def test_a_query_attends_to_the_keys_that_all_of_the_arguments_let_it_see(
    seed: int, causal: bool, window: int | None, packed: bool, padded: bool, masked: bool, groups: int,
    scale: float | None,
) -> None:  # fmt: skip
    q, k, v, direction = draw(seed, (2, 4, 5, 3), (2, groups, 5, 3), (2, groups, 5, 3), (2, 4, 5, 3))
    kinds = random.randint(random.key(seed + 1), (3, 5, 5), 0, 3)
    sees = {
        "causal": causal, "window": window, "documents": kinds[0, :2] if packed else None,
        "key_mask": kinds[1, :2] > 0 if padded else None, "mask": kinds[2] > 0 if masked else None,
    }  # fmt: skip

    def with_gradients(f: Any) -> Any:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        value = f(*leaves)
        return value, torch.autograd.grad(torch.sum(value * direction), leaves, materialize_grads=True)

    wanted = with_gradients(lambda q, k, v: one_query_at_a_time(q, k, v, scale, **sees))
    for implementation in BOTH:
        found = with_gradients(
            lambda q, k, v, by=implementation: nn.attention(q, k, v, scale=scale, implementation=by, **sees)
        )
        # float64 softmaxes of five scores
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", BOTH)
def test_a_query_that_sees_nothing_has_zeros_and_so_has_what_it_is_made_of(implementation: Any) -> None:
    q, k, v = (x.requires_grad_() for x in draw(0, *[(1, 2, 4, 3)] * 3))
    padding = torch.tensor([[False, False, True, True]])
    seen = nn.attention(q, k, v, causal=True, key_mask=padding, implementation=implementation)
    gradients = torch.autograd.grad(torch.sum(seen**2), [q, k, v])
    for nothing in (seen, *gradients):
        assert torch.equal(nothing[:, :, :2], torch.zeros_like(nothing[:, :, :2]))
        assert torch.all(nothing[:, :, 3].abs().sum(-1) > 0) or nothing is gradients[0]


@pytest.mark.parametrize("implementation", BOTH)
def test_a_document_in_a_row_equals_itself_alone_and_none_has_a_gradient_of_another(implementation: Any) -> None:
    q, k, v = draw(1, (1, 4, 9, 3), (1, 2, 9, 3), (1, 2, 9, 3))
    documents = torch.tensor([[5, 5, 5, 1, 1, 2, 2, 2, 2]])

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.attention(q, k, v, causal=True, documents=documents, implementation=implementation)

    for a, b in ((0, 3), (3, 5), (5, 9)):
        alone = nn.attention(*(x[:, :, a:b] for x in (q, k, v)), causal=True, implementation=implementation)
        torch.testing.assert_close(packed(q, k, v)[:, :, a:b], alone, rtol=1e-12, atol=1e-12)
        of = grad(lambda *x, a=a, b=b: torch.sum(packed(*x)[:, :, a:b] ** 2), argnums=(0, 1, 2))(q, k, v)
        for slope in of:
            outside = torch.cat([slope[:, :, :a], slope[:, :, b:]], 2)
            assert torch.equal(outside, torch.zeros_like(outside)) and slope[:, :, a:b].any()


def test_the_kernel_takes_masks_and_groups_and_the_formula_what_it_cannot() -> None:
    q, k, v, direction = draw(2, (2, 4, 6, 3), (2, 2, 6, 3), (2, 2, 6, 3), (2, 4, 6, 3))
    documents = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 2, 2]])
    options: dict[str, Any] = {"causal": True, "window": 3, "documents": documents}
    by: list[str] = []

    def energy(q: Tensor, implementation: Any = "fused") -> Tensor:
        seen = nn.attention(q, k, v, implementation=implementation, **options)
        by.append(str(seen.grad_fn))
        return torch.sum(torch.sin(seen))

    ft.grad(energy)(q)
    assert "Scaled" in by[0], "first derivatives are the kernel's"
    for implementation in BOTH:
        slope = grad(lambda q, by=implementation: energy(q, by))
        twice = grad(lambda q, slope=slope: torch.sum(slope(q) * direction))(q)
        forward = jvp(slope, (q,), (direction,))[1]
        wanted = torch.autograd.functional.hvp(lambda q: energy(q, "math"), q, direction)[1]
        # float64 sums of a few hundred terms
        torch.testing.assert_close((twice, forward), (wanted, wanted), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", BOTH)
def test_a_lane_of_a_map_equals_itself_alone(implementation: Any) -> None:
    q, k, v = draw(3, (3, 2, 4, 5, 3), (3, 2, 2, 5, 3), (3, 2, 2, 5, 3))
    documents = random.randint(random.key(3), (3, 2, 5), 0, 2)
    key_mask = random.randint(random.key(4), (3, 2, 5), 0, 4) > 0

    def energy(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, key_mask: Tensor) -> Tensor:
        options: Any = {"causal": True, "documents": documents, "key_mask": key_mask}
        return torch.sum(torch.sin(nn.attention(q, k, v, implementation=implementation, **options)))

    slope = grad(energy, argnums=(0, 1, 2))
    alone = [slope(*(x[lane] for x in (q, k, v, documents, key_mask))) for lane in range(3)]
    stacked = tuple(torch.stack(parts) for parts in zip(*alone, strict=True))
    torch.testing.assert_close(vmap(slope)(q, k, v, documents, key_mask), stacked, rtol=1e-12, atol=1e-12)


def test_compiled_equals_eager() -> None:
    q, k, v = draw(4, (2, 4, 8, 4), (2, 2, 8, 4), (2, 2, 8, 4))
    documents = torch.tensor([[0] * 3 + [1] * 5, [0] * 8])
    torch._dynamo.reset()
    f = lambda *x: nn.attention(*x, causal=True, window=3, documents=documents)  # noqa: E731
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), f(q, k, v), rtol=1e-12, atol=1e-12)


Q, G = torch.zeros(1, 4, 3, 2), torch.zeros(1, 3, 3, 2)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"k": G, "v": G}, ValueError, r"heads of q to be a multiple .* k \(1, 3, 3, 2\).* choose some that divide"),
        ({"k": Q[..., :1]}, ValueError, r"expected q \(B, H, T, K\).* came q \(1, 4, 3, 2\), k \(1, 4, 3, 1\)"),
        ({"mask": torch.ones(3, 3)}, TypeError, "a boolean mask.* came torch.float32; pass mask.bool"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, r"= \(1, 4, 3, 3\), came \(2, 3\); .*key_mask="),
        ({"key_mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"key_mask \(B, S\), came \(3,\)"),
        ({"key_mask": torch.ones(1, 3)}, TypeError, "a boolean key_mask.* came torch.float32"),
        ({"documents": torch.zeros(1, 2).long()}, ValueError, r"documents \(B, 3\), came \(1, 2\)"),
        ({"documents": torch.zeros(1, 3)}, TypeError, "documents of integers, came torch.float32"),
        ({"window": 0}, ValueError, "a window of at least 1"),
        ({"q": Q[:, :, :2], "causal": True}, ValueError, "came 2 queries and 3 keys; say by mask="),
        ({"implementation": "flash"}, ValueError, "'fused' or 'math', came 'flash'"),
    ],
)
def test_what_does_not_fit_is_told(change: dict[str, Any], error: type[Exception], says: str) -> None:
    given_ = {"q": Q, "k": Q, "v": Q} | change
    with pytest.raises(error, match=says):
        nn.attention(given_.pop("q"), given_.pop("k"), given_.pop("v"), **given_)
