"""Laws of mixed_precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import functrain as ft
from functrain import tree

law = settings(deadline=None, derandomize=True, max_examples=20)
HALF = [torch.bfloat16, torch.float16]
FLOATS = [*HALF, torch.float32, torch.float64]
KEY = ft.random.key(0)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@law
@given(kept=st.sampled_from(FLOATS), compute=st.sampled_from(FLOATS), output=st.sampled_from(FLOATS))
def test_casts_on_the_way_in_and_out_and_gradients_keep_their_dtype(
    kept: torch.dtype, compute: torch.dtype, output: torch.dtype
) -> None:
    seen: dict[str, Any] = {}

    def fn(params: Any, batch: Any, *, scale: Tensor) -> ft.Loss:
        seen.update(params=params["w"].dtype, x=batch["x"].dtype, ids=batch["ids"], scale=scale.dtype, text=batch["t"])
        value = torch.sum(params["w"][batch["ids"]] * batch["x"] * scale)
        return ft.Loss(value, torch.ones(()), {"count": torch.tensor(3)})

    ids = torch.tensor([0, 2])
    policy = ft.Policy(compute=compute, output=output)
    args = {"w": draw(0, 3).to(kept)}, {"x": draw(1, 2), "ids": ids, "t": "text"}
    loss, grads = ft.value_and_grad(ft.mixed_precision(fn, policy))(*args, scale=torch.ones(()))
    assert (seen["params"], seen["x"], seen["scale"]) == (compute, compute, compute)
    assert seen["ids"] is ids and seen["text"] == "text"
    assert isinstance(loss, ft.Loss) and loss.total.dtype == loss.weight.dtype == output
    assert loss.metrics["count"].dtype == torch.int64
    assert grads["w"].dtype == kept


@pytest.mark.parametrize("compute", HALF)
def test_gradients_equal_those_of_casting_by_hand(compute: torch.dtype) -> None:
    def fn(w: Tensor, x: Tensor) -> Tensor:
        return torch.sum(torch.tanh(x @ w) ** 2)

    w, x = draw(0, 4, 3), draw(1, 5, 4)
    value, grads = ft.value_and_grad(ft.mixed_precision(fn, ft.Policy(compute=compute)))(w, x)
    leaf = w.to(compute).requires_grad_()
    expected = fn(leaf, x.to(compute))
    (by_hand,) = torch.autograd.grad(expected, leaf)
    assert torch.equal(value, expected.detach().float()) and torch.equal(grads, by_hand.float())


def test_the_same_dtype_changes_no_bit() -> None:
    def fn(w: Tensor, x: Tensor) -> Tensor:
        return torch.mean(torch.tanh(x @ w) ** 2)

    w, x = draw(0, 4, 3), draw(1, 5, 4)
    plain = ft.value_and_grad(fn)(w, x)
    policy = ft.Policy(compute=torch.float32)
    assert all(tree.leaves(tree.map(torch.equal, ft.value_and_grad(ft.mixed_precision(fn, policy))(w, x), plain)))


def test_composes_with_vmap_and_grad_of_grad() -> None:
    fn = ft.mixed_precision(lambda w: torch.sum(w**3), ft.Policy(compute=torch.bfloat16))
    w = torch.tensor([[1.0, 2.0], [-3.0, 0.5]])
    # small integers and halves: every product is a bfloat16
    assert torch.equal(ft.vmap(ft.grad(fn))(w), 3 * w**2)
    assert torch.equal(ft.grad(lambda w: torch.sum(ft.grad(fn)(w)))(w), 6 * w)


def test_a_key_and_its_bits_are_not_touched() -> None:
    fn = ft.mixed_precision(lambda key: (key, ft.random.bits(key, (3,))), ft.Policy(compute=torch.bfloat16))
    key, bits = fn(KEY)
    assert key is KEY and torch.equal(bits, ft.random.bits(KEY, (3,)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool, "bfloat16", None])
@pytest.mark.parametrize("name", ["compute", "output"])
def test_a_policy_of_no_floating_point_dtype_is_refused(name: str, dtype: Any) -> None:
    with pytest.raises(TypeError, match=f"Policy: {name}: expected a floating-point torch.dtype, came "):
        ft.Policy(**({"compute": torch.bfloat16} | {name: dtype}))


def test_a_policy_is_frozen_and_keyword_only() -> None:
    policy = ft.Policy(compute=torch.bfloat16)
    assert policy.output == torch.float32
    with pytest.raises(AttributeError):
        policy.compute = torch.float16  # type: ignore[misc]
    with pytest.raises(TypeError):
        ft.Policy(torch.bfloat16)  # type: ignore[misc]


@pytest.mark.parametrize("policy", [torch.bfloat16, None])
def test_a_dtype_for_a_policy_is_refused(policy: Any) -> None:
    with pytest.raises(TypeError, match=r"mixed_precision: expected a Policy, came .*Policy\(compute=dtype\)"):
        ft.mixed_precision(torch.sum, policy)


@pytest.mark.parametrize("transform", [ft.mixed_precision, ft.autocast])
def test_a_name_that_is_no_preset_is_refused(transform: Any) -> None:
    with pytest.raises(ValueError, match="expected a Policy or one of 'bf16', 'fp16', 'full', came 'bfloat16'"):
        transform(torch.sum, "bfloat16")


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("full", torch.float32)]
)
def test_presets_compute_in_their_dtype_and_return_float32(name: str, dtype: torch.dtype) -> None:
    seen: list[torch.dtype] = []
    result = ft.mixed_precision(lambda x: seen.append(x.dtype) or x, name)(torch.ones(2))
    assert seen == [dtype] and result.dtype == torch.float32


NORMS = ft.Policy(compute=torch.bfloat16, exceptions={"blocks/*/ln/**": torch.float32, "y": torch.float64})


def test_exceptions_hold_by_path_in_any_argument_and_the_last_that_fits_counts() -> None:
    params = {"blocks": [{"ln": {"w": draw(0, 3)}, "w": draw(1, 3)}]}

    def dtypes(params: Any, batch: Any) -> Any:
        return [leaf.dtype for leaf in tree.leaves((params, batch))]

    found: Any = ft.mixed_precision(dtypes, NORMS)(params, {"x": draw(2, 3), "y": draw(3, 3)})
    assert found == [torch.float32, torch.bfloat16, torch.bfloat16, torch.float64]
    last = ft.Policy(compute=torch.bfloat16, exceptions={"**": torch.float64, "x": torch.float32})
    assert ft.mixed_precision(dtypes, last)({"w": draw(0, 3)}, {"x": draw(1, 3)}) == [torch.float64, torch.float32]


def test_an_exception_that_fits_no_path_is_refused() -> None:
    with pytest.raises(tree.PathError, match=r"blocks/\*/ln/\*\*: this pattern fits no path; .*'y'"):
        ft.mixed_precision(lambda batch: batch, NORMS)({"x": draw(0, 3), "y": draw(1, 3)})


def test_a_layer_norm_kept_in_float32_is_computed_in_it() -> None:
    policy = ft.Policy(compute=torch.bfloat16, exceptions={"ln/*": torch.float32})
    x, weight, bias = draw(0, 4, 300) + 100, draw(1, 300), draw(2, 300)
    for norm, params in (
        (ft.nn.layer_norm, {"weight": weight, "bias": bias}),
        (ft.nn.layer_norm, {"weight": weight}),
        (ft.nn.rms_norm, {"weight": weight}),
    ):
        seen: list[torch.dtype] = []

        def fn(params: Any, x: Tensor, norm: Any = norm, seen: Any = seen) -> Tensor:
            y = norm(x, **params["ln"])
            seen.append(y.dtype)
            return y

        got = ft.mixed_precision(fn, policy)({"ln": params}, x)
        expected = norm(x.bfloat16().float(), **params).bfloat16().float()
        assert seen == [torch.bfloat16], "what follows goes on in the compute dtype"
        assert torch.equal(got, expected)


def test_cast_params_keeps_exceptions_and_the_function_expects_what_it_made() -> None:
    policy = ft.Policy(compute=torch.bfloat16, param=torch.bfloat16, exceptions={"ln/*": torch.float32})
    params = {"w": draw(0, 3), "ln": {"w": draw(1, 3)}, "ids": torch.arange(2)}
    cast = policy.cast_params(params)
    assert [leaf.dtype for leaf in tree.leaves(cast)] == [torch.int64, torch.float32, torch.bfloat16]
    fn = ft.mixed_precision(lambda params: params["w"], policy)
    assert torch.equal(fn(cast), cast["w"].float())
    with pytest.raises(TypeError, match="w: expected torch.bfloat16 as the policy's param says, came torch.float32"):
        fn(params)
    with pytest.raises(ValueError, match="give it a `param` dtype"):
        ft.Policy(compute=torch.bfloat16).cast_params(params)


def test_with_a_param_dtype_an_exception_may_be_of_the_batch_alone() -> None:
    exceptions = {"ln/*": torch.float32, "y": torch.float64}
    policy = ft.Policy(compute=torch.bfloat16, param=torch.bfloat16, exceptions=exceptions)
    exceptions["x"] = torch.float64  # a policy is frozen: it does not follow
    cast = policy.cast_params({"w": draw(0, 3), "ln": {"w": draw(1, 3)}})
    seen = ft.mixed_precision(lambda params, batch: [leaf.dtype for leaf in batch.values()], policy)
    assert seen(cast, {"x": draw(2, 3), "y": draw(3, 3)}) == [torch.bfloat16, torch.float64]
    with pytest.raises(tree.PathError, match="y: this pattern fits no path"):
        seen(cast, {"x": draw(2, 3)})


@pytest.mark.parametrize("exceptions", [None, ["ln/*"], {0: torch.float32}])
def test_exceptions_that_are_no_patterns_are_refused(exceptions: Any) -> None:
    with pytest.raises(TypeError, match="Policy: exceptions: expected a dict from patterns to dtypes, came "):
        ft.Policy(compute=torch.bfloat16, exceptions=exceptions)


def test_autocast_equals_torchs_context_and_returns_the_output_dtype() -> None:
    def fn(w: Tensor, x: Tensor) -> Tensor:
        y = x @ w
        assert y.dtype == torch.bfloat16 and x.dtype == torch.float32
        return torch.sum(torch.tanh(y) ** 2)

    w, x = draw(0, 4, 3), draw(1, 5, 4)
    value, grads = ft.value_and_grad(ft.autocast(fn, "bf16"))(w, x)
    leaf = w.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = fn(leaf, x)
    (by_hand,) = torch.autograd.grad(expected, leaf)
    assert torch.equal(value, expected.detach().float()) and torch.equal(grads, by_hand)
    mapped = ft.vmap(ft.grad(ft.autocast(fn, "bf16")), in_dims=(None, 0))(w, x[:, None])
    each = torch.stack([ft.grad(ft.autocast(fn, "bf16"))(w, row[None]) for row in x])
    # one bfloat16 product and its derivative, summed in another order: 2 * 2**-8
    torch.testing.assert_close(mapped, each, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("policy", "dtype"), [("full", torch.float32), ("fp16", torch.float16)])
def test_a_part_inside_of_an_autocast_computes_in_its_policys_dtype(policy: str, dtype: torch.dtype) -> None:
    seen: list[torch.dtype] = []

    def product(w: Tensor, x: Tensor) -> Tensor:
        seen.append((x @ w).dtype)
        return x @ w

    part = ft.mixed_precision(product, policy)
    loss = ft.autocast(lambda w, x: torch.sum(product(part(x, w), w)), "bf16")
    grads = ft.grad(loss)(draw(0, 3, 3), draw(1, 3, 3))
    assert seen == [dtype, torch.bfloat16] and grads.dtype == torch.float32


def test_autocast_refuses_what_it_cannot_keep() -> None:
    with pytest.raises(ValueError, match="for others use ft.mixed_precision"):
        ft.autocast(torch.sum, NORMS)
    with pytest.raises(ValueError, match="expected to compute in bfloat16 or float16, came torch.float32"):
        ft.autocast(torch.sum, "full")


def masked(params: Any, batch: Any, key: Tensor) -> ft.Loss:
    errors = torch.tanh(batch["x"] @ params["w"]) @ params["v"] - batch["y"]  # (B,)
    mask = batch["mask"].to(errors.dtype)
    return ft.Loss(torch.sum(mask * errors**2), torch.sum(mask), {"absolute": torch.sum(mask * errors.abs())})


def test_a_training_step_in_bfloat16_over_parts_is_close_to_float32() -> None:
    params = {"w": draw(0, 4, 8), "v": draw(1, 8)}
    batch = {"x": draw(2, 7, 4), "y": draw(3, 7), "mask": torch.tensor([1, 0, 1, 1, 1, 0, 1])}
    optimizer = ft.optim.sgd(0.01)
    state = ft.init_state(params, optimizer, key=KEY)
    low = ft.mixed_precision(masked, ft.Policy(compute=torch.bfloat16))
    wide, expected = ft.train_step(masked, optimizer)(state, batch)
    for parts in (1, 2, 3):
        new, metrics = ft.train_step(low, optimizer, accumulate=parts)(state, batch)
        assert all(leaf.dtype == torch.float32 for leaf in tree.leaves(new.params))
        assert all(torch.isfinite(value) and value.dtype == torch.float32 for value in metrics.values())
        assert torch.equal(metrics["weight"], torch.tensor(5.0))
        for name in ("loss", "absolute", "grad_norm"):
            # about ten operations in a row, each rounded by 2**-9 = 0.2%, on errors that lose at most a bit by
            # cancellation and are squared
            torch.testing.assert_close(metrics[name], expected[name], rtol=0.05, atol=0)
        moved = tree.norm(tree.sub(wide.params, params))
        assert tree.norm(tree.sub(new.params, wide.params)) < 0.05 * moved
