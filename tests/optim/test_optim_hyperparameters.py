"""Every number of every optimizer may be a float, a tensor or a schedule, vmapped over and differentiated through."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
from test_optim_laws import close

import functrain as ft
import functrain.optim as ours
import functrain.tree as tree

PARAMS = {"w": torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.3, -0.7]]).double(), "a": torch.tensor(0.8).double()}

# what has no default, and settings in which each number has an effect
ARGUMENTS: dict[str, dict[str, Any]] = {
    "adafactor": dict(dtype_momentum=torch.float64),
    "ademamix": dict(b3=0.5),
    "add_noise": dict(key=1),
    "differentially_private_aggregate": dict(key=1),
    "dog": dict(init_step=("distance", 0.1)),
    "dpsgd": dict(seed=1),
    "galore": dict(rank=1),
    "keep_ema": dict(inner=ours.sgd(0.1)),
    "lars": dict(trust_coefficient=1.0),
    "layerwise_decay": dict(depth=len, deepest=3),
    "lbfgs": dict(linesearch=None),
    "lookahead": dict(fast_optimizer=ours.sgd(0.1), sync_period=2),
    "measure_with_ema": dict(measure=lambda updates: updates),
    "mechanize": dict(base_optimizer=ours.sgd(0.1), s_init=0.3),
    "momo_adam": dict(learning_rate=10.0),
    "noisy_sgd": dict(key=1),
    "polyak_sgd": dict(max_learning_rate=50.0),
    "prodigy": dict(estim_lr0=0.01, estim_lr_coef=3.0),
    "radam": dict(b2=0.9),
    "reduce_on_plateau": dict(patience=1),
    "scale_by_backtracking_linesearch": dict(max_backtracking_steps=5, max_learning_rate=10.0),
    "scale_by_distance_over_gradients": dict(reps_rel=0.1),
    "scale_by_dog": dict(init_step=("distance", 0.1)),
    "scale_by_galore": dict(rank=1),
    "scale_by_lion": dict(mode="smooth"),
    "scale_by_radam": dict(b2=0.9),
    "scale_by_soap": dict(precondition_frequency=1),
    "scale_by_sophia": dict(clip_threshold=None, update_interval=1, b2=0.3, gamma=0.3, eps=0.1),
    "scale_by_zoom_linesearch": dict(max_linesearch_steps=5),
    "schedule_free": dict(base_optimizer=ours.sgd(0.1)),
    "skip_loss_spikes": dict(inner=ours.sgd(0.1), window=2),
    "soap": dict(precondition_frequency=1),
    "sophia": dict(clip_threshold=None, update_interval=1, b2=0.3, gamma=0.3, eps=0.1),
}
VALUES: dict[str, tuple[float, float]] = {
    "increase_factor": (1.5, 2.0),
    "eta_plus": (1.2, 1.5),
    "min_norm": (3.0, 2.0),
    "min_scale": (3.0, 2.0),
    "preconditioner_update_probability": (0.9, 0.1),
    "sigma_factor": (100.0, 0.1),
}
OWN_VALUES: dict[str, tuple[float, float]] = {
    "adaptive_grad_clip/eps": (3.0, 2.0),
    "prodigy/estim_lr_coef": (3.0, 2.0),
    "radam/threshold": (5.0, 4.0),
    "scale_by_radam/threshold": (5.0, 4.0),
    "scale_by_cocob/alpha": (1.0, 3.0),
    "cocob/alpha": (2.5, 3.0),
    "scale_by_zoom_linesearch/increase_factor": (1.5, 4.0),
    "reduce_on_plateau/rtol": (0.9, 0.01),
    "reduce_on_plateau/atol": (5.0, 0.01),
    "lion/b1": (0.99, 0.0),
    "lion/b2": (0.99, 0.0),
    "radam/b2": (0.9, 0.95),
    "scale_by_radam/b2": (0.9, 0.95),
}
STEPS = {"radam": 9, "scale_by_radam": 9}
# constant rates of an average whose weights they are, and of gradients whose size does not matter
WITHOUT_EFFECT = {
    "cocob/learning_rate",
    "schedule_free/learning_rate",
    "schedule_free/weight_lr_power",
    "schedule_free_adamw/weight_lr_power",
    "schedule_free_sgd/weight_lr_power",
}


def numbers_of_factories() -> list[str]:
    """Return "factory/argument" for each number that makes a transformation."""
    found = []
    for name, fn in sorted(vars(ours).items()):
        if name.startswith("_") or not inspect.isfunction(inspect.unwrap(getattr(fn, "func", fn))):
            continue
        signature = inspect.signature(fn)
        if str(signature.return_annotation).startswith("GradientTransformation"):
            kinds = {argument: str(parameter.annotation) for argument, parameter in signature.parameters.items()}
            found += [f"{name}/{argument}" for argument, kind in kinds.items() if "Scalar" in kind or "float" in kind]
    return found


# numbers that are compared with: what is decided by them has no derivative, and two of them may decide alike
DECIDING = {
    "kron/preconditioner_update_probability",
    "scale_by_kron/preconditioner_update_probability",
    "radam/threshold",
    "scale_by_radam/threshold",
    "reduce_on_plateau/rtol",
    "reduce_on_plateau/atol",
    "skip_loss_spikes/sigma_factor",
    *(number for number in numbers_of_factories() if "linesearch" in number),
}
every_number = pytest.mark.parametrize("number", numbers_of_factories())
pytestmark = pytest.mark.filterwarnings("ignore:optimistic_adam is deprecated:DeprecationWarning")


def values_of(number: str) -> tuple[float, float]:
    return OWN_VALUES.get(number, VALUES.get(number.split("/")[1], (0.3, 0.2)))


def kind_of(number: str) -> str:
    name, argument = number.split("/")
    return str(inspect.signature(getattr(ours, name)).parameters[argument].annotation)


def make(number: str, value: Any) -> Any:
    name, argument = number.split("/")
    signature = inspect.signature(getattr(ours, name)).parameters.items()
    needed = {
        other: values_of(f"{name}/{other}")[0]
        for other, parameter in signature
        if parameter.default is inspect.Parameter.empty and "Scalar" in str(parameter.annotation)
    }
    value = (value, value) if argument == "betas" else value
    return getattr(ours, name)(**needed | ARGUMENTS.get(name, {}) | {argument: value})


def run(number: str, tx: Any, params: Any = PARAMS) -> list[Any]:
    """Return the params after each step, and the last state."""
    name, seen, tx = number.split("/")[0], [], ours.with_extra_args_support(tx)
    if name in ("scale_by_muon", "scale_by_shape"):
        params = {"w": params["w"]}
    start = params
    params = ours.LookaheadParams.init_synced(params) if name == "lookahead" else params
    state = tx.init(params)
    for step in range(STEPS.get(name, 3)):
        at = params.fast if name == "lookahead" else params
        grads = tree.map(lambda p, step=step: torch.cos(7 * p + step) + p, at)
        more: dict[str, Any] = dict(value=loss(at))
        if "sophia" in name:
            more["obj_fn"] = loss
        if "search" in name or name == "lbfgs":
            grads = ft.grad(loss)(at)
            more |= dict(grad=grads, value_fn=loss)
            grads = grads if name == "lbfgs" else tree.scale(-1.0, grads)
        if name in ("dpsgd", "differentially_private_aggregate"):
            grads = tree.map(lambda g: torch.stack([g, 2 * g, -g / 2]), grads)
        updates, state = tx.update(grads, state, params, **more)
        params = ours.apply_updates(at, updates) if name == "measure_with_ema" else ours.apply_updates(params, updates)
        seen.append(state.average if name == "keep_ema" else params)  # what the numbers of an average are about
    tree.check_same_structure(params.fast if name == "lookahead" else params, start)
    return [*seen, state]


def loss(params: Any) -> Any:
    return tree.sum(tree.map(lambda p: torch.cos(p) + p**2, params))


@functools.cache
def plain(number: str, which: int) -> Any:
    return run(number, make(number, values_of(number)[which]))[:-1]


def tensor(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


@every_number
def test_a_number_may_be_a_tensor_or_a_schedule(number: str) -> None:
    x, _ = values_of(number)
    # the same operations in the same order, float or tensor: a few roundings of 1e-16
    assert close(run(number, make(number, tensor(x)))[:-1], plain(number, 0), 1e-12)
    if "Schedule" in kind_of(number):
        assert close(run(number, make(number, lambda count: tensor(x)))[:-1], plain(number, 0), 1e-12)
    elif not number.endswith("betas"):
        injected = ours.inject_hyperparams(lambda value: make(number, value))(lambda count: tensor(x))
        assert close(run(number, injected)[:-1], plain(number, 0), 1e-12)


@every_number
def test_a_number_has_an_effect_and_may_be_vmapped_over(number: str) -> None:
    if number not in DECIDING:
        assert close(plain(number, 0), plain(number, 1), 1e-9) == (number in WITHOUT_EFFECT)
    lanes = ft.vmap(lambda v: run(number, make(number, v))[:-1])(torch.stack([tensor(x) for x in values_of(number)]))
    for i in range(2):
        # reductions add in another order
        assert close(tree.map(lambda leaf, i=i: leaf[i], lanes), plain(number, i), 1e-9)


@pytest.mark.parametrize("number", [number for number in numbers_of_factories() if number not in DECIDING])
def test_the_derivative_by_a_number_equals_finite_differences(number: str) -> None:
    def end(x: Any) -> torch.Tensor:
        return tree.norm(run(number, make(number, x))[:-1])

    x, h = tensor(values_of(number)[0]), 1e-6
    slope = (end(x + h) - end(x - h)) / (2 * h)
    # central differences of float64: h² from the third derivative, 1e-16 / h from rounding
    torch.testing.assert_close(ft.grad(end)(x), slope, rtol=1e-5, atol=1e-7)


@every_number
def test_a_wide_number_leaves_narrow_params_and_states_narrow(number: str) -> None:
    params = tree.cast(PARAMS, torch.float32)
    made = [run(number, make(number, x), params) for x in (values_of(number)[0], tensor(values_of(number)[0]))]
    assert [leaf.dtype for leaf in tree.leaves(made[0])] == [leaf.dtype for leaf in tree.leaves(made[1])]


@pytest.mark.parametrize("gradient", [ft.grad, torch.func.grad], ids=["ft", "torch"])
def test_the_gradient_by_the_learning_rate_through_five_clipped_steps_is_right(gradient: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    x, y, x_val, y_val = [torch.randn(8, 3, generator=draw, dtype=torch.float64) for _ in range(4)]
    params = {
        "w": torch.randn(3, 4, generator=draw, dtype=torch.float64),
        "v": torch.randn(4, 3, generator=draw, dtype=torch.float64),
    }

    def error(params: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ft.losses.l2_loss(torch.tanh(x @ params["w"]) @ params["v"], y).mean()

    def validation(log_lr: torch.Tensor) -> torch.Tensor:
        optimizer = ours.chain(ours.clip_by_global_norm(0.5), ours.adamw(torch.exp(log_lr), weight_decay=0.1))
        p, state = params, optimizer.init(params)
        for _ in range(5):
            updates, state = optimizer.update(gradient(error)(p, x, y), state, p)
            p = ours.apply_updates(p, updates)
        return error(p, x_val, y_val)

    log_lr, h = torch.log(tensor(0.05)), 1e-5
    slope = (validation(log_lr + h) - validation(log_lr - h)) / (2 * h)
    # central differences: h² is 1e-10, and roundings of 1e-16 over h are 1e-11
    torch.testing.assert_close(gradient(validation)(log_lr), slope, rtol=1e-6, atol=0.0)
    assert abs(slope) > 0.01
