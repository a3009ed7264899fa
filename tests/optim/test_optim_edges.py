"""Gradients of 0, and those whose squares leave the dtype: updates and states are finite, and have a derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad

import functrain as ft
from functrain import optim, tree
from functrain.testing import declared
from functrain.testing.law import Subject, Trial
from functrain.testing.strategies import fill

# learning rates and arguments that they cannot be without
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "adaptive_grad_clip": (0.1,), "add_decayed_weights": (0.1,), "clip": (1.0,), "clip_by_block_rms": (1.0,),
    "clip_by_global_norm": (1.0,), "ema": (0.9,), "scale": (0.1,), "scale_by_dog": (("distance", 0.1),),
    "scale_by_madgrad": (0.1,), "scale_by_rprop": (0.1,), "trace": (0.9, True),
}  # fmt: skip
PARTS = [
    *ARGUMENTS, "centralize", "keep_params_nonnegative", "normalize", "normalize_by_update_norm",
    *[name for name in sorted(vars(optim)) if name.startswith("scale_by_") and name not in ARGUMENTS],
]  # fmt: skip
NO_PARTS = {
    "scale_by_backtracking_linesearch", "scale_by_learning_rate", "scale_by_muon", "scale_by_schedule",
    "scale_by_shape", "scale_by_zoom_linesearch",
}  # fmt: skip
OPTIMIZERS = [
    "acprop", "adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamaxw", "adamw", "adan", "ademamix",
    "adopt", "amsgrad", "cocob", "dadapt_adamw", "dog", "dowg", "fromage", "galore", "kron", "lamb", "lars", "lion",
    "madgrad", "momo", "momo_adam", "muon", "nadam", "nadamw", "novograd", "optimistic_adam_v2",
    "optimistic_gradient_descent", "polyak_sgd", "prodigy", "radam", "rmsprop", "rprop", "schedule_free_adamw",
    "schedule_free_sgd", "sgd", "sign_sgd", "signum", "simplified_ademamix", "sm3", "soap", "sophia", "yogi",
]  # fmt: skip
OTHERS: dict[str, Callable[[], Any]] = {
    "adafactor factored": lambda: optim.adafactor(0.1, min_dim_size_to_factor=2, momentum=0.9),
    "adam eps=0": lambda: optim.adam(0.1, eps=0.0),
    "dog learning_rate": lambda: optim.dog(0.1, ("learning_rate", 0.1)),
    "lbfgs": lambda: optim.lbfgs(0.1, linesearch=None),
    "mechanize": lambda: optim.mechanize(optim.adam(0.1)),
    "momo adapt_lower_bound": lambda: optim.momo(0.1, adapt_lower_bound=True),
    "momo_adam adapt_lower_bound": lambda: optim.momo_adam(0.1, adapt_lower_bound=True),
    "muon adaptive": lambda: optim.muon(0.1, adaptive=True),
    "muon aol": lambda: optim.muon(0.1, preconditioning="aol"),
    "muon schatten": lambda: optim.muon(0.1, preconditioning="schatten"),
    "muon spectral": lambda: optim.muon(0.1, preconditioning="spectral"),
    "rmsprop centered": lambda: optim.rmsprop(0.1, centered=True, momentum=0.9),
    "rmsprop eps outside": lambda: optim.rmsprop(0.1, eps_in_sqrt=False),
    "sgd momentum": lambda: optim.sgd(0.1, 0.9, nesterov=True),
    "sam": lambda: optim.sam(optim.sgd(0.1), optim.chain(optim.normalize(), optim.sgd(0.05))),
}  # fmt: skip
MADE: dict[str, Callable[[], Any]] = {
    **{
        name: lambda name=name: getattr(optim, name)(*ARGUMENTS.get(name, ())) for name in PARTS if name not in NO_PARTS
    },
    **{name: lambda name=name: getattr(optim, name)(0.1) for name in OPTIMIZERS},
    **OTHERS,
}
SIGNS = {
    "b": torch.tensor([1.0, 0.0, -1.0]),
    "w": torch.tensor([[1.0, -1.0, 0.5], [0.25, 1.0, -0.5]]),
}
SIZES = [0.0, 1e-25, 1e-3, 1e20]
EDGES = [(dtype, size) for dtype in (torch.float32, torch.bfloat16, torch.float64) for size in SIZES]
EDGES += [(torch.float16, size) for size in (0.0, 1e-7, 1e-3, 300.0, 2e4)] + [(torch.float64, 1e200)]


def quartic(params: Any) -> Tensor:
    return sum((torch.sum(leaf.float() ** 4) for leaf in tree.leaves(params)), torch.zeros(()))


def two_steps(tx: Any, params: Any, gradient: Callable[[int], Any]) -> tuple[Any, Any]:
    tx = optim.with_extra_args_support(tx)
    state, updates = tx.init(params), None
    for step in range(2):
        grads = gradient(step)
        updates, state = tx.update(grads, state, params, value=torch.tensor(1.0), obj_fn=quartic)
        for path, leaf in tree.items((updates, state)):
            assert not leaf.is_floating_point() or leaf.isfinite().all(), (step, path, leaf)
        for u, p in zip(tree.leaves(updates), tree.leaves(params), strict=True):
            assert u.dtype == p.dtype
    return updates, state


@pytest.mark.parametrize("name", MADE)
def test_updates_and_states_are_finite_at_every_size_in_every_dtype(name: str) -> None:
    for dtype, size in EDGES:
        for params in (tree.ones_like(SIGNS, dtype), tree.zeros_like(SIGNS, dtype)):
            two_steps(
                MADE[name](),
                params,
                lambda step, size=size, dtype=dtype: tree.map(
                    lambda s: (s.double() * size * (1, -0.5)[step]).to(dtype), SIGNS
                ),
            )


@pytest.mark.parametrize("size", [1e-3, 1e20])
@pytest.mark.parametrize("name", ["adam", "nadam", "amsgrad", "adabelief", "ademamix", "rmsprop", "soap"])
def test_a_large_gradient_is_the_step_of_a_small_one(name: str, size: float) -> None:
    params, grads = torch.ones(3), torch.tensor([1.0, -1.0, 0.5])
    made = []
    for scale in (1.0, size):
        tx = getattr(optim, name)(0.1, eps=1e-12)
        state, updates = tx.init(params), params
        for _ in range(2):
            updates, state = tx.update(scale * grads, state, params)
        made.append(updates)
    torch.testing.assert_close(made[1].sign(), made[0].sign())
    assert 0.01 < float(made[1].abs().max() / made[0].abs().max()) < 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "rmsprop", "adagrad", "lamb", "novograd", "sm3", "adan", "muon"])
def test_half_precision_is_the_float32_step_rounded(name: str, dtype: torch.dtype) -> None:
    for size in (1e-5, 1e-3, 300.0):
        grads = tree.map(lambda s, size=size: (s * size).to(dtype), SIGNS)
        params = tree.ones_like(SIGNS)
        half, _ = two_steps(getattr(optim, name)(0.1), tree.cast(params, dtype), lambda step, g=grads: g)
        full, _ = two_steps(getattr(optim, name)(0.1), params, lambda step, g=grads: tree.cast(g, torch.float32))
        for mine, want in zip(tree.leaves(half), tree.leaves(full), strict=True):
            # bfloat16 rounds each moment, and each Newton-Schulz step, to 2**-8
            torch.testing.assert_close(mine.float(), want, rtol=5e-2, atol=2e-2 * float(want.abs().max()))


def test_moments_of_float16_are_float32_and_those_of_bfloat16_stay_short() -> None:
    for dtype, kept in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        state = optim.scale_by_adam().init(torch.ones(2, dtype=dtype))
        assert state.mu.dtype == state.nu.dtype == kept
    assert optim.scale_by_adam(mu_dtype=torch.float16).init(torch.ones(2)).mu.dtype == torch.float16


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_is_seen_in_eager_and_compiled(value: float) -> None:
    tx, params = optim.adam(0.1), torch.ones(4)
    grads = torch.tensor([value, 1.0, -1.0, 1e20])
    for update in (tx.update, ft.compile(tx.update)):
        updates, _ = update(grads, tx.init(params), params)
        assert updates.isnan().tolist() == [True, False, False, False]
        torch.testing.assert_close(updates[1:], torch.tensor([-0.1, 0.1, -0.1]))


SMOOTH = [
    "acprop", "adabelief", "adadelta", "adagrad", "adam", "adamw", "adan", "ademamix", "adopt", "amsgrad", "lamb",
    "madgrad", "momo_adam", "muon", "nadam", "novograd", "prodigy", "dadapt_adamw", "radam", "rmsprop",
    "schedule_free_adamw", "simplified_ademamix", "soap", "yogi", "rmsprop eps outside", "rmsprop centered",
]  # fmt: skip


@pytest.mark.parametrize("name", SMOOTH)
def test_a_derivative_through_an_update_with_zeros_is_that_of_differences(name: str) -> None:
    params = {"b": torch.ones(3, dtype=torch.float64), "w": torch.ones(2, 3, dtype=torch.float64)}
    subject = Subject(
        MADE[name], None, fill, lambda step: {"value": torch.tensor(1.0, dtype=torch.float64)}, 1e-5, None
    )
    with torch.enable_grad():
        declared.differentiable(subject, Trial(params, 3))

        def moved(g: Tensor) -> Tensor:
            tx, state = optim.with_extra_args_support(MADE[name]()), None
            state = tx.init(params)
            grads = {"b": g, "w": params["w"]}
            for _ in range(2):
                updates, state = tx.update(grads, state, params, value=torch.tensor(1.0, dtype=torch.float64))
            return tree.sum(updates)

        for zeros in (torch.tensor([0.0, 0.3, -0.2]), torch.zeros(3)):
            assert grad(moved)(zeros.double()).isfinite().all()
