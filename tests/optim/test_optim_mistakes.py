"""Mistakes of a caller's: shapes, states, masks and numbers that are of something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import functrain as ft
from functrain import optim, tree

ONES = torch.ones


@pytest.mark.parametrize(
    ("param", "update"), [((3, 1), (3,)), ((3,), (3, 1)), ((3,), ()), ((2, 3), (3,)), ((1,), (3,))]
)
def test_an_update_of_another_shape_is_refused_by_its_path(param: tuple[int, ...], update: tuple[int, ...]) -> None:
    params, updates = {"a": ONES(2), "w": ONES(param)}, {"a": ONES(2), "w": ONES(update)}
    for name, call in {
        "apply_updates": lambda: optim.apply_updates(params, updates),
        "incremental_update": lambda: optim.incremental_update(updates, params, 0.1),
        "periodic_update": lambda: optim.periodic_update(updates, params, torch.tensor(2), 2),
    }.items():
        with pytest.raises(
            ValueError,
            match=rf"{name}: w: expected shape .*{param}.* came .*{update}".replace("(", r"\(").replace(")", r"\)"),
        ):
            call()


LEAFWISE = ["adam", "adamw", "adafactor", "adagrad", "lion", "lamb", "rmsprop", "novograd", "muon", "schedule_free_sgd"]


@pytest.mark.parametrize("name", LEAFWISE)
def test_a_state_of_other_shapes_is_not_broadcast(name: str) -> None:
    tx, params = getattr(optim, name)(0.1), {"w": ONES(3, 3)}
    with pytest.raises(ValueError, match=r"w: expected states and params that fit an update of shape \(3, 3\), came"):
        tx.update(params, tx.init({"w": ONES(1, 3)}), params)
    tx.update(params, tx.init(params), params)


@pytest.mark.parametrize(
    ("tx", "other"),
    [
        (optim.adam(0.1), optim.sgd(0.1, 0.9)),  # whose `count` would be that of a tuple
        (optim.lion(0.1), optim.adamw(0.1)),  # which has all that lion reads
        (optim.rmsprop(0.1), optim.adamw(0.1)),
        (optim.lbfgs(0.1), optim.adamw(0.1)),
        (optim.sgd(0.1, 0.9), optim.chain(optim.sgd(0.1), optim.scale(1.0))),
    ],
)
def test_a_state_of_another_optimizer_is_told_as_one(tx: Any, other: Any) -> None:
    params = {"w": ONES(3)}
    with pytest.raises(ValueError, match=r"chain: transformation 0: expected a state of its own, .*init made of these"):
        tx.update(params, other.init(params), params, value=ONES(()), grad=params, value_fn=tree.sum)


@pytest.mark.parametrize(
    "tx",
    [
        optim.muon(0.1),
        optim.masked(optim.adam(0.1), {"w": True}),
        optim.schedule_free_sgd(0.1),
        optim.inject_hyperparams(optim.adam)(0.1),
    ],
)
def test_a_wrapper_tells_a_state_of_another_kind(tx: Any) -> None:
    params = {"w": ONES(3, 3)}
    with pytest.raises(ValueError, match="came a state of type tuple; pass the state that the same optimizer's init"):
        tx.update(params, optim.sgd(0.1, 0.9).init(params), params)
    tx.update(params, tx.init(params), params)


@tree.dataclass
class Net:
    w: Any
    b: Any

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.w + self.b


def test_a_node_that_can_be_called_is_a_mask_and_no_function() -> None:
    params = Net(ONES(3), ONES(()))
    for tx in (
        optim.masked(optim.scale(0.0), Net(True, False)),
        optim.freeze(Net(True, False)),
        optim.partition({"off": optim.set_to_zero(), "on": optim.identity()}, Net("off", "on")),
        optim.partition({"off": optim.set_to_zero(), "on": optim.identity()}, lambda p: Net("off", "on")),
    ):
        updates, _ = tx.update(params, tx.init(params), params)
        assert updates.w.sum() == 0 and updates.b == 1


@pytest.mark.parametrize(
    "mask",
    [
        lambda p: tree.map(lambda x: x.ndim > 1, p),
        lambda p: {"w": True},
        lambda p: p["w"].ndim > 1,
        lambda p: ONES(3),
    ],
)
def test_a_mask_among_injected_hyperparameters_names_the_way_out(mask: Any) -> None:
    with pytest.raises(
        TypeError, match="inject_hyperparams: mask: expected a number or a schedule.*static_args='mask'"
    ):
        optim.inject_hyperparams(optim.adamw)(0.1, mask=mask).init({"w": ONES(3)})


def test_schedules_are_injected_as_before() -> None:
    params = {"w": ONES(3)}
    for rate in (lambda count: 0.5, lambda count: torch.tensor(0.5), ft.schedules.constant_schedule(0.5)):
        tx = optim.inject_hyperparams(optim.sgd)(rate)
        assert float(tx.update(params, tx.init(params))[0]["w"][0]) == -0.5


RATES = ["adam", "adafactor", "cocob", "dog", "kron", "lbfgs", "lion", "muon", "rprop", "schedule_free_adamw", "sgd"]


@pytest.mark.parametrize("name", RATES)
def test_a_learning_rate_that_is_text_is_told_when_the_optimizer_is_made(name: str) -> None:
    with pytest.raises(TypeError, match=r"expected a number, came str '1e-3'; write float\('1e-3'\)"):
        getattr(optim, name)("1e-3")


def test_other_numbers_that_are_text_are_told() -> None:
    params = {"w": ONES(3)}

    def updated(tx: Any) -> Any:
        return tx.update(params, tx.init(params), params, value=ONES(()))

    for made in (
        lambda: optim.adamw(0.1, weight_decay="1e-2"),  # type: ignore[arg-type]
        lambda: optim.scale("1e-3"),  # type: ignore[arg-type]
        lambda: updated(optim.adam(0.1, eps="1e-8")),  # type: ignore[arg-type]
        lambda: updated(optim.prodigy("1.0")),  # type: ignore[arg-type]
        lambda: updated(optim.momo("1.0")),  # type: ignore[arg-type]
        lambda: ft.schedules.cosine_decay_schedule("1e-3", 10),  # type: ignore[arg-type]
        lambda: ft.schedules.warmup_cosine_decay_schedule(0.0, "1e-3", 2, 10),  # type: ignore[arg-type]
        lambda: ft.schedules.exponential_decay("1e-3", 2, 0.5),  # type: ignore[arg-type]
        lambda: optim.inject_hyperparams(optim.sgd)("1e-3").init(params),
    ):
        with pytest.raises(TypeError, match="expected a number, came str"):
            made()
    with pytest.raises(TypeError, match="expected a number, came list .*pass an int, a float"):
        optim.sgd([0.1])  # type: ignore[arg-type]
