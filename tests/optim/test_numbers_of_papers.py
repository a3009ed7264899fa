"""Numbers at which optax is not the witness: those of papers, of torch, and written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import functrain.optim as ours
import functrain.schedules as schedules

# ---- averages of params ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_size", [0.1, torch.tensor(0.1)])
def test_an_average_of_params_copies_what_is_no_number_to_average(step_size: Any) -> None:
    new = {"w": torch.ones(2), "n": torch.tensor(11), "on": torch.tensor([True, False]), "z": torch.tensor([2j])}
    old = {"w": torch.zeros(2), "n": torch.tensor(10), "on": torch.tensor([False, False]), "z": torch.tensor([0j])}
    made = ours.incremental_update(new, old, step_size)
    assert made["n"].dtype == torch.int64 and int(made["n"]) == 11 and made["on"].tolist() == [True, False]
    assert made["n"].data_ptr() != new["n"].data_ptr()
    torch.testing.assert_close(made["w"], torch.full((2,), 0.1))
    torch.testing.assert_close(made["z"], torch.tensor([0.2j]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_average_in_half_precision_is_refused_and_one_of_half_params_moves(dtype: torch.dtype) -> None:
    new, old = {"w": torch.zeros(1, dtype=dtype)}, {"w": torch.ones(1)}
    with pytest.raises(TypeError, match=f"incremental_update: w: an average in {dtype} stops .* keep it in float32"):
        ours.incremental_update(new, {"w": old["w"].to(dtype)}, 0.001)
    for _ in range(3000):
        old = ours.incremental_update(new, old, 0.001)
    # 3000 products round by 6e-8 each
    torch.testing.assert_close(old["w"], torch.tensor([0.999**3000]), rtol=2e-4, atol=0.0)
    tenth = ours.incremental_update({"w": torch.full((1,), 1.1, dtype=dtype)}, {"w": torch.zeros(1)}, 0.1)
    torch.testing.assert_close(tenth["w"], 0.1 * torch.full((1,), 1.1, dtype=dtype).float(), rtol=1e-6, atol=0.0)


# ---- Adafactor ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 3, torch.tensor(3)])
def test_adafactor_decays_from_its_offset_on(offset: Any) -> None:
    tx = ours.scale_by_factored_rms(step_offset=offset)
    params = torch.zeros(2, dtype=torch.float64)
    state, v = tx.init(params), torch.zeros(2, dtype=torch.float64)
    for step in range(6):
        g = torch.tensor([1.0, 3.0], dtype=torch.float64) / (step + 1)
        decay = 1 - (max(step - int(offset), 0) + 1) ** -0.8
        v = decay * v + (1 - decay) * (g**2 + 1e-30)
        updates, state = tx.update(g, state, params)
        torch.testing.assert_close(updates, g / v.sqrt())
    whole = ours.adafactor(0.1, decay_offset=offset)
    updates, _ = whole.update(params + 1, whole.init(params), params)
    assert torch.isfinite(updates).all()


# ---- schedule-free --------------------------------------------------------------------------------------------------


def test_schedule_free_weighs_a_step_by_its_own_rate() -> None:
    b1, peak, warm_up = 0.9, 0.1, 3
    tx = ours.schedule_free_sgd(peak, warmup_steps=warm_up, b1=b1)
    params = torch.tensor(1.0, dtype=torch.float64)
    state = tx.init(params)
    z = x = y = 1.0
    largest = total = 0.0
    for t in range(4):
        rate = peak * min(t / warm_up, 1.0)
        z -= rate * 2 * y
        largest = max(largest, rate)
        total += largest**2
        share = largest**2 / total if total else 0.0
        x = (1 - share) * x + share * z
        y = b1 * x + (1 - b1) * z
        updates, state = tx.update(2 * params, state, params)
        params = ours.apply_updates(params, updates)
        torch.testing.assert_close(params, torch.tensor(y, dtype=torch.float64))
        torch.testing.assert_close(ours.schedule_free_eval_params(state, params), torch.tensor(x, dtype=torch.float64))
    assert float(params) == pytest.approx(0.7041, abs=5e-5)


@pytest.mark.parametrize("b1", [0.0, 0, -0.5, 1.5])
def test_schedule_free_refuses_a_b1_from_which_the_average_is_not_found(b1: float) -> None:
    for make in (
        lambda: ours.schedule_free(ours.sgd(0.1), 0.1, b1),
        lambda: ours.schedule_free_sgd(0.1, b1=b1),
        lambda: ours.schedule_free_adamw(0.1, b1=b1),
    ):
        with pytest.raises(ValueError, match=r"schedule_free: b1 must be in \(0, 1\], came .* use the base optimizer"):
            make()


def test_schedule_free_with_a_schedule_of_the_base_counts_as_the_base_does() -> None:
    rates = schedules.linear_schedule(1.0, 0.0, 4)
    tx = ours.schedule_free(ours.sgd(rates), rates)
    params = torch.ones(1)
    _, state = tx.update(params, tx.init(params), params)
    assert float(state.max_lr) == 1.0 and float(state.weight_sum) == 1.0


# ---- plateaus -------------------------------------------------------------------------------------------------------


def scales(losses: list[float], **options: Any) -> list[float]:
    tx = ours.reduce_on_plateau(**options)
    state, made = tx.init(torch.zeros(1)), []
    for loss in losses:
        _, state = tx.update(torch.ones(1), state, value=torch.tensor(loss))
        made.append(float(state.scale))
    return made


@pytest.mark.parametrize("patience", [1, 2, 5])
@pytest.mark.parametrize("cooldown", [0, 2])
def test_a_plateau_is_that_of_torch_with_one_less_patience(patience: int, cooldown: int) -> None:
    losses = [3.0, 2.0, 2.0, 1.9999, 1.99985, 2.5, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=patience - 1, cooldown=cooldown, eps=0.0
    )
    expected = []
    for loss in losses:
        theirs.step(loss)
        expected.append(optimizer.param_groups[0]["lr"])
    assert scales(losses, factor=0.5, patience=patience, cooldown=cooldown) == expected


@pytest.mark.parametrize("constant", [-1.0, 1.0, 0.0, -1e-3])
@pytest.mark.parametrize("options", [{}, {"rtol": 1.0}, {"rtol": 0.0, "atol": 0.1}])
def test_a_constant_loss_is_a_plateau_of_any_sign(constant: float, options: dict[str, float]) -> None:
    assert scales([constant] * 4, factor=0.5, patience=3, **options) == [1.0, 1.0, 1.0, 0.5]


def test_a_negative_loss_that_falls_by_less_than_the_tolerance_is_a_plateau() -> None:
    assert scales([-1.0, -1.05, -1.09, -1.2], factor=0.5, patience=2, rtol=0.1) == [1.0, 1.0, 0.5, 0.5]
    assert scales([-1.0, -1.2, -1.4, -1.6], factor=0.5, patience=1, rtol=0.1) == [1.0] * 4
