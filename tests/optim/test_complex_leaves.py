"""Complex leaves: each transformation equals its witness there, or refuses them by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from later import Later
from test_optim_laws import examples
from test_optim_parity import CASES, Case, precision

import functrain as ft
import functrain.optim as ours
import functrain.tree as tree

jnp = Later("jax.numpy")
optax = Later("optax")

STEPS = 3

# what is defined for real numbers only
REFUSED = {
    "add_noise", "clip", "cocob", "dadapt_adamw", "galore", "keep_params_nonnegative", "kron", "momo", "momo_adam",
    "prodigy", "scale_by_cocob", "scale_by_kron", "scale_by_sm3", "scale_by_soap", "sm3", "soap",
}  # fmt: skip
# what has a norm, a direction or |g|² in it: equals optax on complex arrays
OPTAX = {
    "acprop", "adabelief", "adafactor", "adan", "adaptive_grad_clip", "ademamix", "clip_by_block_rms", "fromage",
    "lars", "lion", "muon", "novograd", "scale_by_acprop", "scale_by_adan", "scale_by_ademamix", "scale_by_belief",
    "scale_by_factored_rms", "scale_by_lion", "scale_by_novograd", "scale_by_param_block_norm",
    "scale_by_param_block_rms", "scale_by_sign", "scale_by_trust_ratio", "scale_by_yogi", "sign_sgd", "signum", "yogi",
}  # fmt: skip
# what has tests of its own below; everything else equals itself on pairs of real leaves
APART = {"lamb", "layerwise_decay", "round_state_stochastically", "scale_by_distance_over_gradients"}


def numbers(seed: int) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    return {"b": draw.normal(size=3), "w": draw.normal(size=(2, 3)) + 1j * draw.normal(size=(2, 3))}


def run(case: Case | None, tx: Any, as_leaf: Callable[[Any], Any], apply_updates: Any) -> Any:
    params = {k: as_leaf(v) for k, v in numbers(0).items()}
    state = tx.init(params)
    for step in range(STEPS):
        more = {"value": case.loss(step)} if case and case.loss else {}
        grads = {k: as_leaf(v) for k, v in numbers(step + 1).items()}
        updates, state = tx.update(grads, state, params, **more)
        params = apply_updates(params, updates)
    return params


def here(tx: Any, case: Case | None = None) -> Any:
    return run(case, tx, torch.tensor, ours.apply_updates)


def assert_close(came: Any, expected: Any, tolerance: float = 1e-12) -> None:
    for name, leaf in came.items():
        np.testing.assert_allclose(leaf, np.asarray(expected[name]), rtol=tolerance, atol=tolerance, err_msg=name)


def the_kinds(case: Case) -> list[Any]:
    with precision("float64"):
        return [what.build("ours") for what in examples(case, 2)]


@pytest.mark.parametrize("case", [c for c in CASES if c.name in REFUSED], ids=lambda case: case.name)
def test_what_is_for_real_numbers_refuses_complex_leaves_by_name(case: Case) -> None:
    for tx in the_kinds(case):
        with pytest.raises(TypeError, match="w is complex; wrap it in split_real_and_imaginary"):
            here(tx, case)
        assert here(ours.split_real_and_imaginary(tx), case)["w"].dtype == torch.complex128


def test_what_the_other_cases_do_not_make_refuses_complex_leaves_too() -> None:
    params, grads = {"w": torch.ones(2, dtype=torch.complex64)}, {"w": torch.ones(3, 2, dtype=torch.complex64)}
    for tx in [
        ours.noisy_sgd(0.1, key=3),
        ours.dpsgd(0.1, 1.0, 0.1, 3),
        ours.sophia(0.1),
        ours.hutchinson_estimator_diag_hessian(),
    ]:
        with pytest.raises(TypeError, match="w is complex; wrap it in split_real_and_imaginary"):
            tx.init(params)
    private = ours.split_real_and_imaginary(ours.dpsgd(0.1, 1.0, 0.1, 3))
    assert private.update(grads, private.init(params))[0]["w"].shape == (2,)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in OPTAX], ids=lambda case: case.name)
def test_what_has_a_norm_or_a_direction_is_optax(case: Case) -> None:
    with precision("float64"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numpy and jax, where a complex number is made of a real one
        what = examples(case, 1)[0]
        theirs = run(case, what.build("optax"), jnp.asarray, optax.apply_updates)
        # optax has the decays of adafactor in float32
        assert_close(here(what.build("ours"), case), theirs, 1e-6 if "fact" in case.name else 1e-12)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name not in REFUSED | OPTAX | APART], ids=lambda case: case.name
)
def test_everything_else_takes_a_complex_leaf_for_two_real_ones(case: Case) -> None:
    for tx in the_kinds(case):
        # norms and inner products are added in another order
        assert_close(here(tx, case), here(ours.split_real_and_imaginary(tx), case), 1e-6 if case.loss else 1e-11)


def test_a_chain_is_its_parts_and_a_state_of_complex_leaves_stays_long() -> None:
    adam = ours.split_real_and_imaginary(ours.scale_by_adam(eps=1e-6))
    parts = ours.chain(adam, ours.scale_by_trust_ratio(), ours.scale_by_learning_rate(0.1))
    assert_close(here(ours.lamb(0.1)), here(parts))
    rounded = here(ours.round_state_stochastically(ours.adam(0.1)))
    assert torch.equal(rounded["w"], here(ours.adam(0.1))["w"])
    halved = ours.layerwise_decay(0.5, lambda path: int(path == "b"))
    assert_close(here(halved), here(ours.masked(ours.scale(0.5), {"b": False, "w": True})))


def test_a_layers_distance_is_that_of_a_leaf_with_the_parts_side_by_side() -> None:
    tx = ours.chain(ours.scale_by_distance_over_gradients(), ours.scale(-1.0))
    p, grads = torch.randn(3, dtype=torch.complex64), [torch.randn(3, dtype=torch.complex64) for _ in range(3)]
    q, (s, r) = torch.view_as_real(p), (tx.init(p), tx.init(torch.view_as_real(p)))
    for g in grads:
        u, s = tx.update(g, s, p)
        v, r = tx.update(torch.view_as_real(g), r, q)
        p, q = p + u, q + v
    torch.testing.assert_close(torch.view_as_real(p), q)
    assert s[0].init_params.dtype == torch.complex64


TORCH: list[tuple[str, Any, Callable[[Any], Any]]] = [
    ("sgd", ours.sgd(0.1, 0.9, nesterov=True), lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True)),
    ("adam", ours.adam(0.1), lambda p: torch.optim.Adam(p, 0.1)),
    ("adamw", ours.adamw(0.1, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1)),
    ("adamax", ours.adamax(0.1), lambda p: torch.optim.Adamax(p, 0.1)),
    ("rmsprop", ours.rmsprop(0.1, eps_in_sqrt=False), lambda p: torch.optim.RMSprop(p, 0.1, 0.9)),
    (
        "rmsprop of deviations",
        ours.rmsprop(0.1, eps=0.1, eps_in_sqrt=False, centered=True, momentum=0.9),
        lambda p: torch.optim.RMSprop(p, 0.1, 0.9, eps=0.1, centered=True, momentum=0.9),
    ),
    ("radam", ours.radam(0.1, b2=0.5), lambda p: torch.optim.RAdam(p, 0.1, (0.9, 0.5))),
    ("rprop", ours.rprop(0.1), lambda p: torch.optim.Rprop(p, 0.1)),
    (
        "adagrad",
        ours.adagrad(0.1, initial_accumulator_value=0.5, eps=0.0),
        lambda p: torch.optim.Adagrad(p, 0.1, initial_accumulator_value=0.5, eps=0.0),
    ),
    ("adadelta", ours.adadelta(0.1), lambda p: torch.optim.Adadelta(p, 0.1)),
]


@pytest.mark.parametrize(("name", "mine", "theirs"), TORCH, ids=[name for name, _, _ in TORCH])
def test_what_equals_torch_equals_it_on_complex_leaves_and_takes_its_state(name: str, mine: Any, theirs: Any) -> None:
    leaf = torch.nn.Parameter(torch.tensor(numbers(0)["w"]))
    optimizer, state, params = theirs([("w", leaf)]), None, {"w": leaf.detach().clone()}
    state = mine.init(params)
    for step in range(8):
        grads = {"w": torch.tensor(numbers(step + 1)["w"])}
        updates, state = mine.update(grads, state, params)
        params = ours.apply_updates(params, updates)
        leaf.grad = grads["w"].clone()
        optimizer.step()
        if step == 4:
            state = ours.from_torch_state(state, optimizer.state_dict(), step=step + 1)
    torch.testing.assert_close(params["w"], leaf.detach(), rtol=1e-9, atol=1e-12)


def test_a_conjugate_gradient_and_a_transposed_leaf_are_what_their_copies_are() -> None:
    def loss(p: Any) -> torch.Tensor:
        return torch.sum((p["w"].conj() * (1 + 2j)).abs() ** 2) + torch.sum(p["w"].imag ** 3)

    params = {"w": torch.randn(2, 3, dtype=torch.complex64).t()}
    _, grads = ft.value_and_grad(loss)(params)
    tx = ours.adamw(0.1)
    updates, _ = tx.update(grads, tx.init(params), params)
    copies = tree.map(lambda x: x.resolve_conj().contiguous(), (grads, params))
    expected, _ = tx.update(copies[0], tx.init(copies[1]), copies[1])
    assert torch.equal(updates["w"], expected["w"])


# ---- what is gathered for a leaf ----------------------------------------------------------------------------------


def test_mini_steps_of_complex_leaves_keep_the_imaginary_part() -> None:
    params = torch.zeros(1, dtype=torch.complex64)
    tx = ours.MultiSteps(ours.sgd(0.1), 2)
    state = tx.init(params)
    for g in (1 + 2j, 3 - 1j):
        updates, state = tx.update(torch.tensor([g], dtype=torch.complex64), state, params)
    torch.testing.assert_close(updates, torch.tensor([-0.2 - 0.05j], dtype=torch.complex64))


GATHERED = {
    "MultiSteps": (ours.MultiSteps(ours.sgd(1.0), 1), lambda s: s.acc_grads),
    "trace": (ours.trace(0.0, accumulator_dtype=torch.float32), lambda s: s.trace),
    "ema": (ours.ema(0.0, accumulator_dtype=torch.float32), lambda s: s.ema),
    "scale_by_adam": (ours.scale_by_adam(mu_dtype=torch.float32), lambda s: s.mu),
    "scale_by_lion": (ours.scale_by_lion(mu_dtype=torch.bfloat16), lambda s: s.mu),
    "scale_by_distance_over_gradients": (ours.scale_by_distance_over_gradients(), lambda s: s.init_params),
    "schedule_free": (ours.schedule_free_sgd(0.1, state_dtype=torch.float32), lambda s: s.z),
}


@pytest.mark.parametrize("name", GATHERED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128])
def test_what_is_gathered_for_a_long_or_complex_leaf_is_as_long_and_complex(name: str, dtype: torch.dtype) -> None:
    tx, gathered = GATHERED[name]
    params = torch.ones(2, dtype=dtype)
    state = tx.init(params)
    assert gathered(state).dtype == dtype
    updates, state = tx.update(params, state, params)
    assert updates.dtype == dtype and gathered(state).dtype == dtype


def test_a_shorter_accumulator_that_was_asked_for_is_kept_for_float32_leaves() -> None:
    assert ours.scale_by_adam(mu_dtype=torch.bfloat16).init(torch.ones(2)).mu.dtype == torch.bfloat16


def test_means_of_numbers_that_float32_has_not_are_finite() -> None:
    params = torch.zeros(1, dtype=torch.float64)
    for tx in (
        ours.MultiSteps(ours.identity(), 2),
        ours.ema(0.0, accumulator_dtype=torch.float32),
        ours.trace(0.0, accumulator_dtype=torch.float32),
    ):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(params + 1e300, state, params)
        assert updates.tolist() == [1e300]


def test_every_case_has_one_witness() -> None:
    names = {case.name for case in CASES}
    assert names >= REFUSED | OPTAX | APART and not REFUSED & OPTAX
