"""Laws of functrain.losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from later import Later
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from functrain.losses import Loss, next_token, next_token_from_hidden, softmax_cross_entropy_with_integer_labels

jnp = Later("jax.numpy")
optax = Later("optax")

B, T, D, V = 2, 6, 5, 11
law = settings(deadline=None, derandomize=True, max_examples=25)

Arguments = tuple[Tensor, Tensor, Tensor]  # hidden (B, T, D), embedding (V, D), mask (B, T)


def draw(seed: int, dtype: torch.dtype = torch.float64, b: int = B, v: int = V) -> tuple[Arguments, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(b, T, D, generator=g, dtype=torch.float64).to(dtype)
    embedding = torch.randn(v, D, generator=g, dtype=torch.float64).to(dtype)
    mask = torch.rand(b, T, generator=g, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
    return (hidden, embedding, mask), torch.randint(v, (b, T), generator=g)


TARGETS = draw(0)[1]


def plain(hidden: Tensor, embedding: Tensor, mask: Tensor) -> Tensor:
    # squares and tanh, so that second derivatives pass through what comes before the loss
    loss = next_token(torch.tanh(hidden) @ (embedding * embedding).mT, TARGETS, mask)
    return loss.total / loss.weight


def chunked(hidden: Tensor, embedding: Tensor, mask: Tensor) -> Tensor:
    loss = next_token_from_hidden(torch.tanh(hidden), embedding * embedding, TARGETS, mask, chunk=5)
    return loss.total / loss.weight


def close(a: object, b: object, atol: float = 1e-12) -> bool:
    # float64 sums of some hundred terms of order 1: 1e-16 times some thousand
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(torch.allclose(x, y, rtol=0, atol=atol) for x, y in pairs)


# ---- softmax_cross_entropy_with_integer_labels --------------------------------------------------------------------


@law
@given(
    seed=st.integers(0, 10**6),
    dim=st.sampled_from([0, 1, -1, (1, 2), (2, 0), (0, 1, 2)]),
    where=st.sampled_from([None, "labels", "logits"]),
)
def test_softmax_cross_entropy_equals_optax(seed: int, dim: int | tuple[int, ...], where: str | None) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, 3, 4)).astype(np.float32)
    dims = [d % 3 for d in ((dim,) if isinstance(dim, int) else dim)]
    batch = [logits.shape[d] for d in range(3) if d not in dims]
    labels = rng.integers(0, int(np.prod([logits.shape[d] for d in dims])), size=batch)
    kept = None if where is None else rng.random(logits.shape if where == "logits" else batch) < 0.5
    if where == "labels" and not isinstance(dim, int) and len(dims) == 3:
        kept = None  # a () mask: optax cannot expand it over several axes
    want = optax.softmax_cross_entropy_with_integer_labels(
        jnp.asarray(logits), jnp.asarray(labels), axis=dim, where=None if kept is None else jnp.asarray(kept)
    )
    got = softmax_cross_entropy_with_integer_labels(
        torch.tensor(logits), torch.tensor(labels), dim, None if kept is None else torch.tensor(kept)
    )
    # float32 rounding of a logsumexp of up to 24 terms below 5
    np.testing.assert_allclose(got.numpy(), np.asarray(want), rtol=1e-5, atol=2e-6)


def test_a_row_that_keeps_nothing_loses_zero_and_has_a_zero_gradient() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    where = torch.tensor([[True, True, False, True], [False] * 4, [False] * 4])
    loss = softmax_cross_entropy_with_integer_labels(logits, torch.tensor([0, 1, 2]), where=where)
    loss.sum().backward()
    assert torch.equal(loss[1:], torch.zeros(2)) and torch.equal(logits.grad[1:], torch.zeros(2, 4))
    assert logits.grad.isfinite().all()


# ---- next_token ---------------------------------------------------------------------------------------------------


@law
@given(seed=st.integers(0, 10**6))
def test_next_token_is_the_masked_sum_of_cross_entropies(seed: int) -> None:
    (hidden, embedding, mask), targets = draw(seed)
    logits = hidden @ embedding.mT
    each = softmax_cross_entropy_with_integer_labels(logits, targets)
    loss = next_token(logits, targets, mask)
    assert isinstance(loss, Loss) and loss.metrics == {}
    assert close(loss.total, torch.sum(each * mask)) and torch.equal(loss.weight, torch.sum(mask))
    whole = next_token(logits, targets)
    assert close(whole.total, each.sum()) and whole.weight == B * T
    assert close(whole.total, torch.nn.functional.cross_entropy(logits.mT, targets, reduction="sum"))


def test_a_boolean_mask_is_weights_of_zero_and_one_and_hides_any_target() -> None:
    (hidden, embedding, mask), targets = draw(3, torch.float32)
    keep = mask > 0.5
    hidden_targets = torch.where(keep, targets, -100)
    for loss_of in (lambda t, m: next_token(hidden @ embedding.mT, t, m),
                    lambda t, m: next_token_from_hidden(hidden, embedding, t, m)):  # fmt: skip
        a, b = loss_of(hidden_targets, keep), loss_of(targets, keep.float())
        assert torch.equal(a.total, b.total) and torch.equal(a.weight, b.weight)
        assert a.weight == keep.sum() and a.total.dtype == a.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_widened(dtype: torch.dtype) -> None:
    (hidden, embedding, mask), targets = draw(4, dtype)
    logits = hidden @ embedding.mT
    assert torch.equal(next_token(logits, targets, mask).total, next_token(logits.float(), targets, mask).total)


def test_wrong_shapes_and_targets_are_named() -> None:
    (hidden, embedding, mask), targets = draw(5)
    logits = hidden @ embedding.mT
    with pytest.raises(ValueError, match=r"logits \(B, T, L\).*came logits \(2, 6, 11\), targets \(2, 5\)"):
        next_token(logits, targets[:, 1:])
    with pytest.raises(ValueError, match=r"mask \(6,\)"):
        next_token(logits, targets, mask[0])
    with pytest.raises(TypeError, match=r"integer targets, came torch.float64"):
        next_token(logits, mask)
    with pytest.raises(ValueError, match=r"embedding \(V, D\), came \(2, 6, 5\) and \(5, 11\)"):
        next_token_from_hidden(hidden, embedding.mT.contiguous(), targets)
    with pytest.raises(ValueError, match="chunk of at least 1 token, came 0"):
        next_token_from_hidden(hidden, embedding, targets, chunk=0)


# ---- next_token_from_hidden ---------------------------------------------------------------------------------------


def gradients(f: object, *args: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in args]
    return torch.autograd.grad(f(*leaves), leaves)


@law
@given(seed=st.integers(0, 10**6), chunk=st.sampled_from([None, 1, 5, 12, 100]))
def test_chunked_equals_plain_in_value_and_gradient(seed: int, chunk: int | None) -> None:
    arguments, targets = draw(seed)

    def one(h: Tensor, e: Tensor, m: Tensor) -> Tensor:
        return next_token(h @ e.mT, targets, m).total

    def other(h: Tensor, e: Tensor, m: Tensor) -> Tensor:
        return next_token_from_hidden(h, e, targets, m, chunk=chunk).total

    assert close(one(*arguments), other(*arguments)) and close(gradients(one, *arguments), gradients(other, *arguments))
    # the value is the same bits whether or not a gradient is computed beside it
    leaves = [x.requires_grad_() for x in arguments]
    with torch.no_grad():
        alone = other(*leaves)
    assert torch.equal(alone, other(*leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_equals_plain_to_rounding(dtype: torch.dtype) -> None:
    (h, e, m), targets = draw(7, dtype)
    one = gradients(lambda h, e: next_token(h @ e.mT, targets, m).total, h, e)
    other = gradients(lambda h, e: next_token_from_hidden(h, e, targets, m, chunk=5).total, h, e)
    assert [g.dtype for g in other] == [dtype, dtype]
    # entries are sums of up to 12 products of order 1; both sides round each product and the sum, bfloat16 to 2**-8
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 8 * 2.0**-8}[dtype]
    assert close(one, other, atol=tolerance)


def second(f: object) -> object:
    def squares(h: Tensor, e: Tensor, m: Tensor) -> Tensor:
        return sum((g**2).sum() for g in grad(f, argnums=(0, 1, 2))(h, e, m))

    return grad(squares, argnums=(0, 1, 2))


def second_by_autograd(f: object) -> object:
    def gradient(h: Tensor, e: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (h, e, m)]
            first = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
            return torch.autograd.grad(sum((g**2).sum() for g in first), leaves)

    return gradient


def mapped(f: object) -> object:
    """Map over two hidden states and masks, the embedding being shared."""
    return lambda h, e, m: vmap(f, in_dims=(0, None, 0))(torch.stack([h, h * 2]), e, torch.stack([m, m * m]))


DERIVATIVES = {
    "grad": lambda f: grad(f, argnums=(0, 1, 2)),
    "autograd": lambda f: lambda *args: _autograd(f, *args),
    "vmap of grad": lambda f: mapped(grad(f, argnums=(0, 1, 2))),
    "grad of vmap": lambda f: grad(lambda *args: mapped(f)(*args).sum(), argnums=(0, 1, 2)),
    "grad of grad": second,
    "autograd of autograd": second_by_autograd,
    "vmap of grad of grad": lambda f: mapped(second(f)),
    "by the embedding of vmap of grad by hidden": lambda f: grad(
        lambda h, e, m: (mapped(grad(f))(h, e, m) ** 2).sum(), argnums=1
    ),
}
EAGER_ONLY = {
    "jvp": lambda f: lambda *args: jvp(f, args, args),
    "jvp of grad": lambda f: lambda *args: jvp(grad(f, argnums=(0, 1, 2)), args, args),
    "jvp by the embedding of grad by hidden": lambda f: (
        lambda h, e, m: jvp(lambda e: grad(f)(h, e, m), (e,), (e,))
    ),
    "hessian by the embedding": lambda f: hessian(f, argnums=1),
    "third": lambda f: grad(lambda *args: (second(f)(*args)[0] ** 2).sum(), argnums=(0, 1, 2)),
}  # fmt: skip


def _autograd(f: object, *args: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        return gradients(f, *args)


@pytest.mark.parametrize("name", [*DERIVATIVES, *EAGER_ONLY])
def test_every_derivative_of_chunked_equals_plain(name: str) -> None:
    transform = {**DERIVATIVES, **EAGER_ONLY}[name]
    arguments, _ = draw(8)
    # third derivatives have entries of some hundred
    assert close(transform(plain)(*arguments), transform(chunked)(*arguments), atol=1e-10 if name == "third" else 1e-12)


@pytest.mark.parametrize("name", DERIVATIVES)
def test_every_derivative_of_chunked_compiles_to_the_same(name: str) -> None:
    arguments, _ = draw(9)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(DERIVATIVES[name](chunked), fullgraph=True, backend="aot_eager")
        assert close(compiled(*arguments), DERIVATIVES[name](plain)(*arguments))


def test_a_compiled_chunked_loss_is_differentiated_from_outside() -> None:
    arguments, _ = draw(10)
    torch._dynamo.reset()
    assert close(gradients(torch.compile(chunked, fullgraph=True), *arguments), gradients(plain, *arguments))


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation returns, and counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *sizes])
        self.products += "mm" in func.name()
        return out


@pytest.mark.parametrize("by_functorch", [False, True])
def test_no_tensor_of_all_logits_ever_exists(by_functorch: bool) -> None:
    vocab, chunk = 90, 4
    (h, e, m), targets = draw(11, b=8, v=vocab)
    chunks = 8 * T // chunk

    def loss(h: Tensor, e: Tensor) -> Tensor:
        return next_token_from_hidden(h, e, targets, m, chunk=chunk).total

    with LargestTensor() as seen:
        grad(loss, argnums=(0, 1))(h, e) if by_functorch else gradients(loss, h, e)
    # an embedding's gradient (V, D) is larger than the logits of a chunk (4, V), all logits (48, V) are not there
    assert seen.elements == vocab * max(D, chunk)
    assert seen.products == 3 * chunks
    with LargestTensor() as value_only, torch.no_grad():
        loss(h, e)
    assert value_only.products == chunks
    with LargestTensor() as frozen:
        gradients(lambda h: loss(h, e), h)
    assert frozen.products == 2 * chunks
