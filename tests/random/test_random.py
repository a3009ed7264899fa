"""Laws of keys and draws. The witness of the bits is `jax.random`, of the normal the exact inverse in float64."""

from __future__ import annotations

import math
import random as python_random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from later import Later
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import functrain as ft
from functrain import random
from functrain.random import hashing, values

jax = Later("jax")

laws = settings(deadline=None, derandomize=True, max_examples=15)
seeds = st.integers(-(2**63), 2**63 - 1)
shapes = st.sampled_from([(), (3, 5), (2, 0, 3), (257, 300)])  # few: jax compiles each; the last is several blocks
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def from_jax(array: Any) -> Tensor:
    if array.dtype == "bfloat16":
        return torch.from_numpy(np.array(array.astype("float32"))).bfloat16()
    found = np.array(array)
    return torch.from_numpy(found.view(np.int32) if found.dtype == np.uint32 else found)


def words(key: Any) -> Tensor:
    return from_jax(jax.random.key_data(key))


# ---- equal to jax -----------------------------------------------------------------------------------------------


@laws
@given(seed=seeds, num=st.integers(1, 5), data=st.integers(0, 2**32 - 1))
def test_keys_are_jax_keys(seed: int, num: int, data: int) -> None:
    key, witness = random.key(seed), jax.random.key(seed)
    assert torch.equal(key, words(witness))
    assert torch.equal(random.split(key, num), words(jax.random.split(witness, num)))
    folded = words(jax.random.fold_in(witness, data))
    assert torch.equal(random.fold_in(key, data), folded)
    assert torch.equal(random.fold_in(key, torch.tensor(data)), folded)


@laws
@given(seed=seeds, shape=shapes)
def test_draws_are_jax_draws(seed: int, shape: tuple[int, ...]) -> None:
    key, witness = random.key(seed), jax.random.key(seed)
    assert torch.equal(random.bits(key, shape), from_jax(jax.random.bits(witness, shape)))
    assert torch.equal(random.bernoulli(key, 0.3, shape), from_jax(jax.random.bernoulli(witness, 0.3, shape)))
    for dtype, name in DTYPES.items():
        assert torch.equal(random.uniform(key, shape, dtype), from_jax(jax.random.uniform(witness, shape, name)))
        mine = random.uniform(key, shape, dtype, -0.1, 0.123)
        theirs = from_jax(jax.random.uniform(witness, shape, name, -0.1, 0.123))
        # on a CPU that computes in float16 itself, XLA rounds the product, of at most 0.223, before it adds
        error = 2.0**-14 + 2.0**-15 if dtype == torch.float16 else 0.0
        torch.testing.assert_close(mine, theirs, rtol=0, atol=error)
    # jax's own error is 5.8e-6 of the exact inverse in the tail, ours 3.5e-7
    normal = from_jax(jax.random.normal(witness, shape))
    torch.testing.assert_close(random.normal(key, shape), normal, rtol=6.5e-6, atol=0)
    # two roundings of the bounds' erf, 6e-8 each, grow by sqrt(pi / 2) exp(x**2 / 2), at -2 by 9.3
    truncated = from_jax(jax.random.truncated_normal(witness, -2.0, 1.0, shape))
    torch.testing.assert_close(random.truncated_normal(key, -2.0, 1.0, shape), truncated, rtol=1e-6, atol=1.2e-6)


@pytest.mark.parametrize(
    "key, counter, answer",
    [
        ((0x00000000, 0x00000000), 0x00000000_00000000, (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFF_FFFFFFFF, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), 0x243F6A88_85A308D3, (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_bits_are_the_known_answers_of_random123(key: tuple[int, int], counter: int, answer: tuple[int, int]) -> None:
    # its kat_vectors for threefry2x32-20; the only witness of the high counter word, out of reach for jax's shapes
    signed = torch.tensor(key, dtype=torch.int64).to(torch.int32)
    assert random.bits(signed, (1,), offset=counter).item() & 0xFFFFFFFF == answer[0] ^ answer[1]


@laws
@given(seed=seeds, low=st.integers(-(2**31), 2**31 - 2), size=st.integers(1, 2**32 - 1))
def test_randint_is_jax_randint(seed: int, low: int, size: int) -> None:
    high = min(low + size, 2**31 - 1)
    mine = random.randint(random.key(seed), (100,), low, high)
    assert torch.equal(mine, from_jax(jax.random.randint(jax.random.key(seed), (100,), low, high)).long())


def test_float64_is_jax_under_x64() -> None:
    key = random.key(5)
    with jax.enable_x64(True):
        witness = jax.random.key(5)
        assert torch.equal(random.uniform(key, (1000,), torch.float64), from_jax(jax.random.uniform(witness, (1000,))))
        mine, other = random.normal(key, (1000,), torch.float64), from_jax(jax.random.normal(witness, (1000,)))
    # both invert to a few units in the last place, 2.2e-16, which near 1 - u**2 = 1e-3 become 1e3 times as many
    torch.testing.assert_close(mine, other, rtol=1e-12, atol=0)


def test_normal_is_the_exact_inverse_of_every_uniform() -> None:
    u = torch.arange(0, 2**23, 7, dtype=torch.float64) * 2.0**-22 - (1 - 2.0**-24)
    exact = math.sqrt(2) * torch.erfinv(u)
    # 3.5e-7 measured over all 2**23, six roundings of 6e-8: the polynomial, 1 - u**2 and three products
    torch.testing.assert_close(values.inverse_normal(u.float()).double(), exact, rtol=3.6e-7, atol=0)


# ---- the same bits in every mode --------------------------------------------------------------------------------


def draws(key: Tensor, data: Tensor) -> tuple[Tensor, ...]:
    first, second = random.split(random.fold_in(key, data)).unbind()
    return random.bits(first, (5, 61)), random.normal(first, (305,)), random.bernoulli(second, 0.3, (305,))


def mask(key: Tensor, data: Tensor) -> Tensor:
    return random.bernoulli(random.fold_in(key, data), 0.3, (305,))


@pytest.fixture(scope="module")
def compiled() -> Any:
    by_torch, ours = torch.compile(mask, fullgraph=True), ft.compile(draws)
    by_torch(random.key(0), torch.tensor(0)), ours(random.key(0), torch.tensor(0))
    return by_torch, ours


@settings(laws, max_examples=8)
@given(seed=seeds, data=st.integers(-(2**63), 2**63 - 1))
def test_compiled_and_vmapped_draws_are_the_eager_bits(compiled: Any, seed: int, data: int) -> None:
    key = random.key(seed)
    keys, indices = torch.stack([key, random.split(key)[1]]), torch.tensor([data, 3])
    lanes = torch.func.vmap(draws)(keys, indices)
    # other keys and other data never recompile
    by_torch, ours = compiled
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(by_torch(keys[0], indices[0]), mask(keys[0], indices[0]))
    for lane, inside, alone in zip(lanes, ours(keys[0], indices[0]), draws(keys[0], indices[0]), strict=True):
        assert torch.equal(lane[0], alone)
        assert torch.equal(inside, alone)


def test_draws_of_mapped_keys_are_the_eager_bits_when_compiled() -> None:
    def small(key: Tensor, data: Tensor) -> tuple[Tensor, ...]:
        inner = torch.func.vmap(lambda key: random.uniform(key, ()))(random.split(key, 3))
        double = random.uniform(key, (3,), torch.float64)
        return (
            random.fold_in(key, data),
            random.fold_in(key, 0),
            random.normal(key, (1,)),
            random.bits(key),
            inner,
            double,
        )

    def folded(key: Tensor, data: Tensor) -> tuple[Tensor, ...]:
        return (random.fold_in(key, data),)

    # to a compiler a sum with 0 is its other term, here every second word of a memory, which rows of 0 first would hide
    keys, data = random.split(random.key(3), 4), torch.tensor([0, 0, 5, -1])
    for compiled, fn in ((ft.compile, small), (lambda fn: torch.compile(fn, fullgraph=True), folded)):
        mapped = torch.func.vmap(fn)
        assert all(torch.equal(a, b) for a, b in zip(compiled(mapped)(keys, data), mapped(keys, data), strict=True))


def all_draws(key: Tensor, n: int, offset: int) -> list[Tensor]:
    shape = (n,)
    return [
        random.bits(key, shape, offset=offset),
        random.uniform(key, shape, minval=-0.1, maxval=0.123, offset=offset),
        random.uniform(key, shape, torch.float64, offset=offset),
        random.normal(key, shape, offset=offset),
        random.normal(key, shape, torch.bfloat16, offset=offset),
        random.truncated_normal(key, -2.0, 1.0, shape, offset=offset),
        random.bernoulli(key, 0.3, shape, offset=offset),
        random.bernoulli(key, torch.tensor(0.3), shape, offset=offset),
        random.randint(key, shape, -3, 7, offset=offset),
    ]


@laws
@given(
    seed=seeds,
    n=st.sampled_from([3, 1000, 40000, 70000]),
    cut=st.floats(0, 1),
    start=st.sampled_from([0, 5, 2**31 - 9, 2**32 - 7, 2**33 - 20]),
)
def test_pieces_at_an_offset_are_the_whole(seed: int, n: int, cut: float, start: int) -> None:
    key, middle = random.key(seed), round(cut * n)
    pieces = zip(all_draws(key, middle, start), all_draws(key, n - middle, start + middle), strict=True)
    for whole, piece in zip(all_draws(key, n, start), pieces, strict=True):
        assert torch.equal(whole, torch.cat(piece))


def test_vmapped_lanes_of_every_draw_are_the_draws_alone() -> None:
    keys = random.split(random.key(1), 3)
    for n, offset in ((11, 0), (40000, 2**32 - 5)):  # one block and several
        lanes = torch.func.vmap(lambda key, n=n, offset=offset: all_draws(key, n, offset))(keys)
        for i in range(3):
            for lane, alone in zip(lanes, all_draws(keys[i], n, offset), strict=True):
                assert torch.equal(lane[i], alone)


# an empty and a () tensor, parts of a line, a line, more, and more than a block
LIKE = [torch.empty(shape) for shape in ((3, 5), (), (0, 4), (128,), (257, 300), (129,))]
MIXED = [torch.empty(5, dtype=torch.bfloat16), torch.empty(9, dtype=torch.float64), *LIKE]


def test_draws_of_each_are_the_draws_alone() -> None:
    stacks = torch.stack([random.split(random.key(seed), len(MIXED)) for seed in (1, 2)])
    lanes = torch.func.vmap(lambda keys: (random.normal_of_each(keys, MIXED), random.bits_of_each(keys, MIXED)))(stacks)
    for i, keys in enumerate(stacks.unbind()):
        normal, bits = random.normal_of_each(keys, MIXED), random.bits_of_each(keys, MIXED)
        for j, (key, x) in enumerate(zip(keys.unbind(), MIXED, strict=True)):
            alone = random.normal(key, x.shape, x.dtype)
            assert normal[j].dtype == x.dtype and torch.equal(normal[j], alone) and torch.equal(lanes[0][j][i], alone)
            alone = random.bits(key, x.shape)
            assert torch.equal(bits[j], alone) and torch.equal(lanes[1][j][i], alone)
    assert random.bits_of_each(random.split(random.key(0), 0), []) == []
    assert [x.shape for x in random.normal_of_each(keys.to("meta"), MIXED)] == [x.shape for x in MIXED]


def test_compiled_draws_of_each_are_the_eager_bits_and_one_pass() -> None:
    def draw(keys: Tensor) -> list[Tensor]:
        return random.normal_of_each(keys, LIKE)

    def operations(count: int) -> int:
        like, keys = [torch.empty(5, 7)] * count, random.split(random.key(0), count)
        graph = make_fx(lambda keys: torch.cat([x.reshape(-1) for x in random.normal_of_each(keys, like)]))(keys).graph
        return sum(node.target is torch.ops.aten.bitwise_xor_.Tensor for node in graph.nodes)

    keys = random.split(random.key(3), len(LIKE))
    compiled = ft.compile(draw)(keys)
    assert all(torch.equal(inside, alone) for inside, alone in zip(compiled, draw(keys), strict=True))
    # 20 rounds; each leaf with its own would be 20 a leaf, which a C++ compiler takes seconds over
    assert operations(2) == operations(9) == 20


def test_an_element_beyond_two_words_of_a_key_has_its_own_counter() -> None:
    # a tensor of 2**32 elements does not fit: the counter that its lines count with is compared
    high, low = torch.tensor([[0], [3]], dtype=torch.int32), torch.arange(4, dtype=torch.int32)
    key = random.key(5)
    both = hashing.two_words(key.unbind(), high, low.expand(2, 4))
    for i, start in enumerate((0, 3 * 2**32)):
        alone = hashing.two_words(key.unbind(), *hashing.counters(start, 4, key.device))
        assert all(torch.equal(a[i], b) for a, b in zip(both, alone, strict=True))


def masked_loss(x: Tensor, key: Tensor, step: Tensor) -> Tensor:
    return (x * random.bernoulli(random.fold_in(key, step), 0.5, x.shape)).sum()


def by_autograd(x: Tensor, key: Tensor, step: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(masked_loss(x, key, step), x)[0]


def test_both_gradient_engines_draw_the_same_eager_and_compiled() -> None:
    x, key, step = torch.ones(100), random.key(4), torch.tensor(2**40 + 9)
    mask = random.bernoulli(random.fold_in(key, 9), 0.5, (100,)).float()
    by_func = torch.func.grad(masked_loss)
    assert torch.equal(by_func(x, key, step), mask)
    assert torch.equal(by_autograd(x, key, step), mask)
    assert torch.equal(ft.compile(by_func)(x, key, step), mask)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        assert torch.equal(torch.compile(by_autograd, fullgraph=True)(x, key, step), mask)
    lanes = torch.func.vmap(by_func, in_dims=(None, None, 0))(x, key, torch.tensor([1, 9]))
    assert torch.equal(lanes[1], mask)


def test_fake_and_meta_keys_give_shapes() -> None:
    assert random.normal(random.key(0, device="meta"), (3, 4)).shape == (3, 4)
    with FakeTensorMode():
        assert random.normal(random.key(0), (10**6, 10**4)).shape == (10**6, 10**4)


def test_no_generator_and_no_argument_changes() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), python_random.getstate()
    key = random.key(3)
    kept = key.clone()
    step = torch.tensor(2)
    first = [*all_draws(key, 100, 0), random.permutation(key, 9), random.split(key), random.fold_in(key, step)]
    again = [*all_draws(key, 100, 0), random.permutation(key, 9), random.split(key), random.fold_in(key, step)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert step == 2
    assert torch.equal(key, kept)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all() and before[2] == python_random.getstate()


# ---- distributions ----------------------------------------------------------------------------------------------


def test_moments_of_normal_and_uniform() -> None:
    n = 1_000_000
    normal, uniform = random.normal(random.key(0), (n,)).double(), random.uniform(random.key(1), (n,)).double()
    # five standard errors of each mean of n terms
    assert abs(normal.mean()) < 5 / math.sqrt(n)
    assert abs(normal.square().mean() - 1) < 5 * math.sqrt(2 / n)
    assert abs(normal.pow(3).mean()) < 5 * math.sqrt(15 / n)
    assert abs(normal.pow(4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert abs(uniform.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / n)
    assert abs(uniform.square().mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / n)
    assert 0 <= uniform.min() and uniform.max() < 1


@pytest.mark.parametrize("lower, upper", [(-2.0, 2.0), (1.0, 3.0), (-30.0, 0.5), (-math.inf, math.inf)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_truncated_normal_keeps_its_bounds(lower: float, upper: float, dtype: torch.dtype) -> None:
    x = random.truncated_normal(random.key(0), lower, upper, (100_000,), dtype)
    assert x.dtype == dtype and lower <= x.min() and x.max() <= upper and x.isfinite().all()
    assert x.min() > -6 and x.max() < 6  # nothing beyond what 2**23 or 100,000 draws can reach


@laws
@given(seed=seeds, n=st.integers(0, 300))
def test_permutation_is_a_permutation(seed: int, n: int) -> None:
    key, rows = random.key(seed), torch.arange(3 * n).reshape(n, 3)
    order = random.permutation(key, n)
    assert order.dtype == torch.int64 and torch.equal(order.sort().values, torch.arange(n))
    assert torch.equal(random.permutation(key, rows), rows[order])


def test_every_permutation_is_as_likely() -> None:
    count = 24_000
    orders = torch.func.vmap(lambda key: random.permutation(key, 4))(random.split(random.key(0), count))
    seen = torch.bincount(orders @ torch.tensor([64, 16, 4, 1]), minlength=256)
    seen = seen[seen > 0].double()
    expected = count / 24
    assert len(seen) == 24
    # 49.7: the chi-square of 23 degrees of freedom stays below with probability 0.999
    assert ((seen - expected) ** 2 / expected).sum() < 49.7


# ---- errors -----------------------------------------------------------------------------------------------------

KEY = random.key(0)


@pytest.mark.parametrize(
    "call, kind, words",
    [
        (lambda: random.key(0.5), TypeError, r"expected an int seed, came float; pass int"),
        (lambda: random.key(2**64), ValueError, r"expected a seed in .*came 18446744073709551616"),
        (lambda: random.bits(torch.zeros(2)), TypeError, r"random.bits: .*came \(2,\) torch.float32; make one with"),
        (lambda: random.normal(random.split(KEY, 3)), TypeError, r"random.normal: .*came \(3, 2\) .*ft.vmap"),
        (lambda: random.split(0), TypeError, r"random.split: .*came int; make one with ft.random.key"),
        (lambda: random.permutation(torch.zeros(3), 3), TypeError, r"random.permutation: expected a key"),
        (lambda: random.randint(torch.zeros(3), (3,), 0, 9), TypeError, r"expected a key"),
        (lambda: random.fold_in(KEY, -1), ValueError, r"data in \[0, 2\*\*32\), came -1"),
        (lambda: random.fold_in(KEY, 1.0), TypeError, r"came float; pass int"),
        (lambda: random.fold_in(KEY, torch.tensor(1.0)), TypeError, r"came \(\) torch.float32"),
        (lambda: random.fold_in(KEY, torch.arange(2)), TypeError, r"came \(2,\) torch.int64; map over many"),
        (lambda: random.bits(KEY, 5), TypeError, r"came 5; write \(5,\)"),
        (lambda: random.bits(KEY, (5,), offset=-1), ValueError, r"offset >= 0, .*came -1"),
        (lambda: random.bits_of_each(KEY, LIKE), TypeError, r"of shape \(6, 2\), came \(2,\) .*split\(key, 6\)"),
        (lambda: random.normal_of_each(KEY[None], [KEY]), TypeError, r"normal_of_each: .*came torch.int32"),
        (lambda: random.normal(KEY, (5,), torch.int32), TypeError, r"came torch.int32; draw float32 and cast"),
        (lambda: random.uniform(KEY, (5,), minval=1.0, maxval=0.0), ValueError, r"came 1.0 and 0.0; exchange"),
        (lambda: random.truncated_normal(KEY, 1.0, -1.0), ValueError, r"\[1.0, -1.0\] is empty"),
        (lambda: random.truncated_normal(KEY, 7.0, 8.0), ValueError, r"nearer to 0"),
        (lambda: random.bernoulli(KEY, 1.5), ValueError, r"p in \[0, 1\], came 1.5"),
        (lambda: random.randint(KEY, (3,), 5, 5), ValueError, r"minval < maxval .*came 5 and 5"),
    ],
)
def test_mistakes_name_what_was_expected_and_a_way_out(call: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        call()


def test_on_the_meta_device_a_draw_has_its_shape_and_dtype():
    key = random.key(0).to("meta")
    for draw in (random.normal, random.uniform, random.bits):
        drawn, real = draw(key, (3, 2)), draw(random.key(0), (3, 2))
        assert (drawn.shape, drawn.dtype, drawn.device.type) == (real.shape, real.dtype, "meta")
    assert random.split(key, 3).shape == (3, 2) and random.fold_in(key, 1).shape == (2,)
    assert torch.vmap(lambda k: random.normal(k, (5,)))(random.split(key, 3)).shape == (3, 5)
