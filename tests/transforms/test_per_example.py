"""Laws of gradients of single examples, and of the steps that use them."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import cut, lowered
from torch import Tensor

import functrain as ft
from functrain import optim, transforms, tree

law = settings(deadline=None, derandomize=True, max_examples=15)
KEY = ft.random.key(0)
# the same float64 operations on one row or on all rows: some dozen roundings of 2**-53 on numbers of size 10
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_fn(params: Any, batch: Any, key: Tensor | None) -> ft.Loss:
    hidden = ft.nn.dropout(torch.tanh(batch["x"] @ params["a"]["w"]), 0.3, key)  # (B, 4)
    errors = hidden @ params["b"] - batch["y"]  # (B,)
    return ft.Loss(torch.sum(batch["mask"] * errors**2), torch.sum(batch["mask"]), {"count": errors.abs().sum()})


def problem(rows: int, seed: int = 0) -> tuple[Any, Any]:
    params = {"a": {"w": draw(seed, 3, 4)}, "b": draw(seed + 1, 4)}
    mask = torch.linspace(0.5, 1.5, rows, dtype=torch.float64)
    return params, {"x": draw(seed + 2, rows, 3), "y": draw(seed + 3, rows), "mask": mask}


def loop(fn: Any, params: Any, batch: Any, key: Tensor | None) -> Any:
    """One value_and_grad call after another, stacked."""
    found = []
    for i in range(len(batch["x"])):
        example = tree.map(lambda leaf, i=i: leaf[i : i + 1], batch)
        found.append(ft.value_and_grad(fn)(params, example, None if key is None else ft.random.fold_in(key, i)))
    return tree.map(lambda *leaves: torch.stack(leaves), *found)


def assert_close(a: Any, b: Any, **tolerance: float) -> None:
    tree.map(lambda x, y: torch.testing.assert_close(x, y, **(tolerance or CLOSE)), a, b)


@law
@given(rows=st.integers(1, 6), chunk=st.one_of(st.none(), st.integers(1, 7)), keyed=st.booleans())
def test_it_equals_a_loop_for_every_chunk_size(rows: int, chunk: int | None, keyed: bool) -> None:
    params, batch = problem(rows)
    key = KEY if keyed else None
    got = transforms.per_example_value_and_grad(loss_fn, chunk_size=chunk)(params, batch, key)
    assert_close(got, loop(loss_fn, params, batch, key))
    assert_close(ft.per_example_grad(loss_fn, chunk_size=chunk)(params, batch, key), got[1])


def test_without_a_key_the_function_is_called_with_two_arguments() -> None:
    params, batch = problem(3)
    got = ft.per_example_grad(lambda p, b: loss_fn(p, b, None))(params, batch)
    assert_close(got, loop(loss_fn, params, batch, None)[1])


def test_aux_comes_with_every_example() -> None:
    params, batch = problem(3)
    fn = ft.per_example_grad(lambda p, b: (loss_fn(p, b, None).total, {"row": b["x"][0]}), has_aux=True)
    grads, aux = fn(params, batch)
    assert torch.equal(aux["row"], batch["x"])
    assert_close(grads, loop(loss_fn, params, batch, None)[1])


def test_what_no_example_has_is_refused() -> None:
    def fn(w: Tensor, x: Tensor, key: Any = None, scale: float = 1.0) -> Any:
        return torch.sum(x @ w) * scale, {"rate": 0.1, "sum": torch.sum(x)}

    both, w, x = ft.per_example_grad(fn, has_aux=True), torch.ones(2), torch.ones(3, 2)
    with pytest.raises(TypeError, match=r"1/rate: expected a tensor .* came float 0.1; make it one"):
        both(w, x)
    with pytest.raises(TypeError, match=r"\(params, batch, key\) by position, came the keyword 'scale'; bind"):
        both(w, x, None, scale=2.0)
    with pytest.raises(TypeError, match="came 4 arguments"):
        both(w, w, x, KEY)


def test_it_composes_with_grad_vmap_and_compile() -> None:
    params, batch = problem(4)
    plain, chunked = (ft.per_example_grad(loss_fn, chunk_size=size) for size in (None, 3))
    want = loop(loss_fn, params, batch, KEY)[1]
    # two chunks of 2 rows without a key, because a chunk is compiled for itself and a hash takes seconds
    unkeyed = ft.compile(ft.per_example_grad(loss_fn, chunk_size=2))(params, batch, None)
    assert_close(unkeyed, loop(loss_fn, params, batch, None)[1])
    assert_close(ft.compile(plain)(params, batch, KEY), want)
    both = tree.map(lambda leaf: torch.stack([leaf, 2 * leaf]), params)
    mapped = ft.vmap(plain, in_dims=(0, None, None))(both, batch, KEY)
    assert_close(tree.map(lambda leaf: leaf[0], mapped), want)
    of_norm = [ft.grad(lambda p, fn=fn: tree.norm(fn(p, batch, KEY)))(params) for fn in (plain, chunked)]
    assert_close(*of_norm)
    direction = tree.map(torch.ones_like, params)
    # a central difference with step 1e-5 in float64: 1e-10 of its third derivative, 1e-11 of rounding
    ends = [tree.norm(plain(tree.add_scale(params, t, direction), batch, KEY)) for t in (1e-5, -1e-5)]
    torch.testing.assert_close(tree.vdot(of_norm[0], direction), (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-7)


def test_it_is_pure() -> None:
    params, batch = problem(4)
    before = tree.map(torch.clone, (params, batch))
    fn = ft.per_example_grad(loss_fn, chunk_size=2)
    first, second = fn(params, batch, KEY), fn(params, batch, KEY)
    assert all(tree.leaves(tree.map(torch.equal, (first, params, batch), (second, *before))))
    assert not any(leaf.requires_grad for leaf in tree.leaves(first))


BAD: list[tuple[Any, str]] = [
    ({"x": torch.ones(2, 3), "y": torch.ones(3)}, r"y: expected a tensor of \(2, ...\), came \(3,\)"),
    ({"x": torch.ones(2, 3), "y": torch.ones(())}, r"y: expected a tensor of \(2, ...\), came \(\)"),
    ({"x": "text"}, r"x: expected a tensor of \(B, ...\), came 'text'"),
    ({}, "expected at least one example"),
    ({"x": torch.ones(0, 3)}, "expected at least one example"),
]


@pytest.mark.parametrize(("batch", "message"), BAD)
def test_a_batch_that_is_no_rows_is_refused(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ft.per_example_grad(loss_fn)(problem(1)[0], batch, KEY)


@pytest.mark.parametrize("size", [0, -1, 1.5])
def test_a_chunk_below_one_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match="expected chunk_size >= 1"):
        ft.per_example_grad(loss_fn, chunk_size=size)


def test_it_equals_opacus_on_a_convolution_and_a_norm() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opacus' own, about its hooks
        from opacus import GradSampleModule

        torch.manual_seed(0)
        module = torch.nn.Sequential(
            torch.nn.Conv1d(2, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.Flatten(), torch.nn.Linear(16, 3)
        ).double()
        params = {name: p.detach().clone() for name, p in module.named_parameters()}
        plain = copy.deepcopy(module)  # opacus leaves its hooks in the module
        hooked = GradSampleModule(module, loss_reduction="sum")
        x, y = draw(0, 5, 2, 6), torch.tensor([0, 1, 2, 1, 0])
        torch.nn.functional.cross_entropy(hooked(x), y, reduction="sum").backward()
        want = {name: p.grad_sample for name, p in module.named_parameters()}

    def loss(params: Any, batch: Any) -> Tensor:
        out = torch.func.functional_call(plain, params, (batch["x"],))
        return torch.nn.functional.cross_entropy(out, batch["y"], reduction="sum")

    got = ft.per_example_grad(loss, chunk_size=2)(params, {"x": x, "y": y})
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], **CLOSE)


# ---- moments and noise ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_moments_are_sums_over_examples(chunk: int | None) -> None:
    params, batch = problem(5)
    got = transforms.gradient_moments(loss_fn, chunk_size=chunk)(params, batch, KEY)
    losses, grads = loop(loss_fn, params, batch, KEY)
    assert_close((got.result, got.grads), tree.map(lambda leaf: leaf.sum(0), (losses, grads)))
    torch.testing.assert_close(got.squared_norm, sum(torch.sum(g**2) for g in tree.leaves(grads)), **CLOSE)
    assert got.examples == 5


@law
@given(seed=st.integers(0, 10**6), size=st.integers(2, 9))
def test_the_variance_is_the_sample_variance(seed: int, size: int) -> None:
    grads = draw(seed, size, 4)
    noise = transforms.gradient_noise(torch.mean(torch.sum(grads**2, 1)), torch.sum(grads.mean(0) ** 2), 1, size)
    torch.testing.assert_close(noise.variance, torch.var(grads, 0).sum(), **CLOSE)


def test_the_estimates_have_no_bias() -> None:
    # gradients with mean (3, 4) and covariance of trace 2 * 0.25: the mean over 4000 batches of 6 of the squared norm,
    # whose deviation is about 2 * 5 * sqrt(0.25 / 6) = 2.0, is right to 5 * 2.0 / sqrt(4000) = 0.16
    grads = 0.5 * draw(0, 4000, 6, 2) + torch.tensor([3.0, 4.0], dtype=torch.float64)
    small, big = grads.square().sum(-1).mean(1), grads.mean(1).square().sum(-1)
    found = [transforms.gradient_noise(a, b, 1, 6) for a, b in zip(small, big, strict=True)]
    assert abs(float(torch.stack([n.squared_norm for n in found]).mean()) - 25.0) < 0.16
    # a variance of 5 degrees of freedom in 2 dims: deviation 0.25 * sqrt(2 * 2 / 5) = 0.22, over 4000: 0.0035
    assert abs(float(torch.stack([n.variance for n in found]).mean()) - 0.5) < 5 * 0.0035
    pairs = grads.reshape(4000, 3, 2, 2).mean(2).square().sum(-1).mean(1)  # batches of 2 for the small ones
    found = [transforms.gradient_noise(a, b, 2, 6) for a, b in zip(pairs, big, strict=True)]
    # 2 degrees of freedom: deviation 0.25 * sqrt(2 * 2 / 2) = 0.35
    assert abs(float(torch.stack([n.variance for n in found]).mean()) - 0.5) < 5 * 0.35 / 4000**0.5


def test_noise_without_gradient_has_an_infinite_scale() -> None:
    noise = transforms.gradient_noise(torch.tensor(1.0), torch.tensor(0.1), 1, 4)
    assert noise.squared_norm < 0 and noise.scale == torch.inf
    with pytest.raises(ValueError, match="expected 1 <= small_size < big_size, came 1 and 1"):
        transforms.gradient_noise(torch.tensor(1.0), torch.tensor(1.0), 1, 1)


def without_key(params: Any, batch: Any, key: Tensor) -> ft.Loss:
    return loss_fn(params, batch, None)


@pytest.mark.parametrize("compiled", [False, True])
def test_noise_scale_step_equals_train_step(compiled: bool) -> None:
    params, batch = problem(6)
    optimizer = optim.adamw(1e-2)
    state = ft.init_state(params, optimizer, key=KEY)
    step = ft.train.noise_scale_step(without_key, optimizer, chunk_size=4)
    got, metrics = (ft.compile(step) if compiled else step)(state, batch)
    want, plain = ft.train_step(without_key, optimizer)(state, batch)
    assert_close(got, want, rtol=1e-9, atol=1e-9)  # Adam's first step divides a gradient by its own size
    assert_close({name: metrics[name] for name in plain}, plain)
    grads = tree.map(lambda g: g * 6 / plain["weight"], loop(loss_fn, params, batch, None)[1])
    variance = sum(torch.var(g, 0).sum() for g in tree.leaves(grads))
    torch.testing.assert_close(metrics["gradient_variance"], variance, **CLOSE)
    squared = plain["grad_norm"] ** 2 - variance / 6
    torch.testing.assert_close(metrics["gradient_squared_norm"], squared, **CLOSE)
    torch.testing.assert_close(metrics["gradient_noise_scale"], variance / squared, **CLOSE)


def test_a_step_compiled_in_pieces_equals_eager_and_is_traced_once_for_all_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traced: list[int] = []

    def noting(params: Any, batch: Any, key: Tensor) -> ft.Loss:
        traced.append(len(batch["x"]))
        return loss_fn(params, batch, None)

    cut(monkeypatch)
    programs = lowered(monkeypatch)
    params, batch = problem(6)
    optimizer = optim.chain(optim.differentially_private_aggregate(1.0, 0.0, seed=1), optim.sgd(0.1))
    state = ft.init_state(params, optimizer, key=KEY)
    found = ft.compile(ft.train.private_step(noting, optimizer, chunk_size=2))(state, batch)
    assert traced == [1]
    assert_close(found, ft.train.private_step(without_key, optimizer, chunk_size=2)(state, batch))
    assert [p.operations["tanh"] > 0 for p in programs].count(True) == 1, "one program has the gradients of a chunk"


def test_the_metrics_are_mccandlish_in_numpy() -> None:
    params, batch = problem(7)
    batch["mask"] = torch.tensor([1.0, 1, 0, 1, 1, 0, 1], dtype=torch.float64)  # two padded rows, one in each chunk
    optimizer = optim.sgd(0.1)
    step = ft.train.noise_scale_step(without_key, optimizer, chunk_size=4)
    _, metrics = step(ft.init_state(params, optimizer, key=KEY), batch)

    x, y, mask = (batch[name].numpy() for name in ("x", "y", "mask"))
    w, b = params["a"]["w"].numpy(), params["b"].numpy()
    grads = []
    for i in np.flatnonzero(mask):
        h = np.tanh(x[i] @ w)
        slope = 2 * (h @ b - y[i])
        grads.append(np.concatenate([np.outer(x[i], slope * b * (1 - h**2)).ravel(), slope * h]))
    size, mean = len(grads), np.mean(grads, 0)
    small, big = np.mean([g @ g for g in grads]), mean @ mean
    variance = (small - big) / (1 - 1 / size)
    squared = (size * big - small) / (size - 1)
    for name, want in {"variance": variance, "squared_norm": squared, "noise_scale": variance / squared}.items():
        np.testing.assert_allclose(metrics[f"gradient_{name}"].numpy(), want, rtol=1e-12)


def test_one_example_of_some_weight_tells_no_variance() -> None:
    params, batch = problem(3)
    step = ft.train.noise_scale_step(without_key, optim.sgd(0.1))
    state = ft.init_state(params, optim.sgd(0.1), key=KEY)
    _, metrics = step(state, batch | {"mask": torch.tensor([0.0, 2, 0], dtype=torch.float64)})
    assert all(metrics[f"gradient_{name}"].isnan() for name in ("variance", "squared_norm", "noise_scale"))
    assert metrics["grad_norm"].isfinite()
    with pytest.raises(ValueError, match="expected two examples or more, came one"):
        step(state, problem(1)[1])


@pytest.mark.parametrize(
    "optimizer",
    [
        optim.polyak_sgd(),
        optim.momo(0.1),
        optim.chain(optim.sgd(0.1), optim.reduce_on_plateau(patience=0, accumulation_size=1)),
    ],
)
def test_an_optimizer_that_takes_the_loss_gets_it(optimizer: Any) -> None:
    params, batch = problem(4)
    states = [ft.init_state(params, optimizer, key=KEY)] * 2
    steps = [ft.train.noise_scale_step(without_key, optimizer), ft.train_step(without_key, optimizer)]
    for _ in range(3):
        states = [step(state, batch)[0] for step, state in zip(steps, states, strict=True)]
    assert_close(*states, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [ft.train.noise_scale_step, ft.train.private_step])
@pytest.mark.parametrize(
    "kept",
    [{"guard": ft.train.skip_nonfinite()}, {"loss_scale": ft.loss_scale.dynamic()}, {"buffers": {"n": torch.ones(1)}}],
)
def test_what_a_step_does_not_update_is_refused(make: Any, kept: Any) -> None:
    params, batch = problem(2)
    optimizer = optim.sgd(0.1)
    state = ft.init_state(params, optimizer, key=KEY, **kept)
    with pytest.raises(ValueError, match=f"expected a state without {next(iter(kept))}, which this step does not"):
        make(without_key, optimizer)(state, batch)
