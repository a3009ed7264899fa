"""Laws of attention within the documents of packed rows, one document after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import functrain as ft
from functrain import nn, random
from functrain.models import llama
from functrain.nn import documents as by_documents

TOKENS = 48
PACKED = torch.tensor([[7] * 17 + [2] * 19 + [-1] * 12, [5] * 48])  # documents that are gone through one by one


def draw(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    keys = random.split(random.key(seed), len(shapes))
    return [random.normal(key, shape, torch.float64) for key, shape in zip(keys, shapes, strict=True)]


def heads(seed: int, groups: int = 4) -> list[Tensor]:
    return draw(seed, (2, 4, TOKENS, 3), (2, groups, TOKENS, 3), (2, groups, TOKENS, 3))


class Operations(TorchDispatchMode):
    """The names of operations that run inside, below every transform."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def count(self, name: str) -> int:
        return self.names.count(f"functrain.scaled_dot_product_of_documents{name}.default")


@settings(deadline=None, derandomize=True, max_examples=20)
@given(
    seed=st.integers(0, 10**6), causal=st.booleans(), groups=st.sampled_from([1, 2, 4]), pieces=st.integers(0, 9),
    scale=st.sampled_from([None, 0.3]), shared=st.booleans(),
)  # fmt: skip
def test_it_is_the_formula_of_a_mask_in_value_and_gradient(
    seed: int, causal: bool, groups: int, pieces: int, scale: float | None, shared: bool
) -> None:
    q, k, v = heads(seed, groups)
    (direction,) = draw(seed + 1, (2, 4, TOKENS, 3))
    borders = random.randint(random.key(seed), (1 if shared else 2, pieces), 1, TOKENS)
    # of few pieces each is a document of its own; of more, numbers come back in a row
    places = (torch.arange(TOKENS) >= borders[..., None]).sum(1)
    documents = places if pieces < 3 else places % 3
    options: dict[str, Any] = {"causal": causal, "documents": documents, "scale": scale}

    def with_gradients(implementation: Any) -> Any:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        value = nn.attention(*leaves, implementation=implementation, **options)
        return value, torch.autograd.grad(torch.sum(value * direction), leaves)

    with Operations() as seen:
        found = with_gradients("fused")
    assert seen.count("") == seen.count("_backward") == 1
    # float64 softmaxes of 48 scores
    torch.testing.assert_close(found, with_gradients("math"), rtol=1e-12, atol=1e-12)


def test_documents_are_gone_through_one_by_one_unless_they_are_short_or_lie_in_pieces() -> None:
    found = by_documents._places(PACKED)
    assert found is not None
    places = [(row.start, part.start, part.stop) for row, _, part in found]
    assert places == [(0, 0, 17), (0, 17, 36), (0, 36, 48), (1, 0, 48)]
    assert by_documents._places(torch.tensor([[1] * 20 + [2] * 20 + [1] * 20])) is None
    assert by_documents._places(torch.arange(60)[None] // 4) is None
    two_rows = torch.tensor([[1] * 40, [1] * 40])  # a number of another row is another document
    assert len(by_documents._places(two_rows) or ()) == 2


def test_what_a_window_or_a_mask_hides_beside_documents_is_hidden() -> None:
    q, k, v = heads(1)
    hidden: list[dict[str, Any]] = [
        {"window": 3}, {"key_mask": PACKED > 0}, {"mask": torch.ones(TOKENS, TOKENS).triu(-5) > 0},
    ]  # fmt: skip
    for more in hidden:
        with Operations() as seen:
            found = nn.attention(q, k, v, causal=True, documents=PACKED, **more)
        assert not seen.count("")
        wanted = nn.attention(q, k, v, causal=True, documents=PACKED, implementation="math", **more)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_lane_of_a_map_equals_itself_alone_and_shared_documents_too() -> None:
    q, k, v = draw(2, (3, 2, 4, TOKENS, 3), (3, 2, 2, TOKENS, 3), (3, 2, 2, TOKENS, 3))
    documents = torch.stack([PACKED, PACKED.flip(0), torch.zeros_like(PACKED)])

    def energy(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
        return torch.sum(torch.sin(nn.attention(q, k, v, causal=True, documents=documents)))

    slope = grad(energy, argnums=(0, 1, 2))
    alone = [slope(q[lane], k[lane], v[lane], documents[lane]) for lane in range(3)]
    with Operations() as seen:
        found = vmap(slope)(q, k, v, documents)
    assert seen.count("_backward") == 1
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*alone, strict=True))), rtol=1e-12, atol=1e-12)
    alone = [slope(q[lane], k[0], v[0], PACKED) for lane in range(3)]
    found = vmap(slope, (0, None, None, None))(q, k[0], v[0], PACKED)
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*alone, strict=True))), rtol=1e-12, atol=1e-12)


def test_second_and_forward_derivatives_are_the_formulas_and_those_of_autograd_are_told() -> None:
    q, k, v = heads(3)
    (direction,) = draw(4, q.shape)

    def energy(q: Tensor, implementation: Any = "fused") -> Tensor:
        return torch.sum(torch.sin(nn.attention(q, k, v, documents=PACKED, implementation=implementation)))

    twice = grad(lambda q: torch.sum(grad(energy)(q) * direction))(q)
    forward = jvp(grad(energy), (q,), (direction,))[1]
    wanted = torch.autograd.functional.hvp(lambda q: energy(q, "math"), q, direction)[1]
    torch.testing.assert_close((twice, forward), (wanted, wanted), rtol=1e-11, atol=1e-11)
    leaf = q.clone().requires_grad_()
    (slope,) = torch.autograd.grad(energy(leaf), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative; .* implementation='math'"):
        slope.sum().backward()


def test_recompute_keeps_it_as_it_keeps_products() -> None:
    q, k, v = heads(5)
    f = lambda q: torch.sin(nn.attention(q, k, v, documents=PACKED)).sum()  # noqa: E731
    for policy, times in (("nothing", 2), ("dots", 1)):
        with Operations() as seen:
            found = ft.grad(ft.recompute(f, policy))(q)
        assert seen.count("") == times
        assert torch.equal(found, ft.grad(f)(q))


def test_compiled_equals_eager_where_documents_are_others_than_those_traced() -> None:
    q, k, v = (x.float() for x in heads(6, 2))

    def energy(qkv: tuple[Tensor, ...], documents: Tensor) -> Tensor:
        turned = [
            x.transpose(1, 2).flatten(2).unflatten(2, (-1, 3)).transpose(1, 2) for x in qkv
        ]  # as a model has them
        return torch.sum(torch.sin(nn.attention(*turned, causal=True, documents=documents)))

    slope = ft.value_and_grad(energy)
    compiled = ft.compile(slope)
    for documents in (PACKED, PACKED.flip(0), torch.arange(TOKENS).expand(2, -1) % 5):
        found, wanted = compiled((q, k, v), documents), slope((q, k, v), documents)
        # float32 sums of a few hundred terms
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    by_torch = torch.compile(lambda q: nn.attention(q, k, v, documents=PACKED), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(by_torch(q), nn.attention(q, k, v, documents=PACKED), rtol=1e-4, atol=1e-5)


def test_a_llama_of_packed_rows_goes_through_documents_and_lets_none_see_another() -> None:
    config = llama.Config(vocab=97, context=64, layers=2, heads=2, key_heads=1, width=8, inner=8)
    params = llama.init(config, random.key(0))

    def hidden(params: Any, tokens: Tensor, *, documents: Tensor, positions: Tensor) -> Tensor:
        return llama.hidden(params, tokens, config, documents=documents, positions=positions)

    with Operations() as seen:
        ft.testing.assert_no_leak(hidden, params, embedding="embed", lengths=(25, 33))
    assert seen.count("") >= 4
