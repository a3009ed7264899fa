"""Schedules give optax's values at every step, as tensors that trace, vmap and differentiate."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from later import Later

import functrain.schedules as schedules

jax = Later("jax")
jnp = Later("jax.numpy")
optax = Later("optax")

values = st.sampled_from([0.0, 1e-3, 0.1, 1.0])
positive = st.sampled_from([1e-3, 0.1, 1.0])
steps = st.integers(1, 12)
scales = st.dictionaries(st.integers(1, 20), st.sampled_from([0.0, 0.1, 0.5, 2.0]), max_size=4)

CASES: dict[str, dict[str, Any]] = {
    "constant_schedule": dict(value=values),
    "linear_schedule": dict(
        init_value=values, end_value=values, transition_steps=st.integers(-1, 12), transition_begin=st.integers(-1, 5)
    ),
    "polynomial_schedule": dict(
        init_value=values,
        end_value=values,
        power=st.sampled_from([1, 2, 0.5]),
        transition_steps=steps,
        transition_begin=st.integers(0, 5),
    ),
    "piecewise_constant_schedule": dict(init_value=values, boundaries_and_scales=st.one_of(st.none(), scales)),
    "exponential_decay": dict(
        init_value=values,
        transition_steps=st.integers(0, 5),
        decay_rate=st.sampled_from([0.0, 0.5, 0.9, 1.5]),
        transition_begin=st.integers(0, 4),
        staircase=st.booleans(),
        end_value=st.one_of(st.none(), values),
    ),
    "cosine_decay_schedule": dict(
        init_value=values, decay_steps=steps, alpha=values, exponent=st.sampled_from([1.0, 2.0, 0.5])
    ),
    "warmup_constant_schedule": dict(init_value=values, peak_value=values, warmup_steps=st.integers(0, 6)),
    "warmup_cosine_decay_schedule": dict(
        init_value=values,
        peak_value=values,
        warmup_steps=st.integers(0, 5),
        decay_steps=st.integers(6, 20),
        end_value=values,
        exponent=st.sampled_from([1.0, 2.0]),
    ),
    "warmup_exponential_decay_schedule": dict(
        init_value=values,
        peak_value=values,
        warmup_steps=st.integers(0, 5),
        transition_steps=steps,
        decay_rate=st.sampled_from([0.5, 1.5]),
        transition_begin=st.integers(0, 3),
        staircase=st.booleans(),
        end_value=st.one_of(st.none(), values),
    ),
    "sgdr_schedule": dict(
        cosine_kwargs=st.lists(
            st.fixed_dictionaries(
                dict(
                    init_value=values,
                    peak_value=values,
                    warmup_steps=st.integers(0, 3),
                    decay_steps=st.integers(4, 9),
                    end_value=values,
                )
            ),
            min_size=1,
            max_size=3,
        )
    ),
    "piecewise_interpolate_schedule": dict(
        interpolate_type=st.sampled_from(["linear", "cosine"]), init_value=values, boundaries_and_scales=scales
    ),
    "linear_onecycle_schedule": dict(transition_steps=st.integers(5, 20), peak_value=positive),
    "cosine_onecycle_schedule": dict(
        transition_steps=st.integers(5, 20), peak_value=positive, pct_start=st.sampled_from([0.2, 0.5])
    ),
}

every_schedule = pytest.mark.parametrize("name", CASES)
COUNTS = range(25)


@every_schedule
def test_it_gives_the_values_of_optax_at_every_step(name: str) -> None:
    @settings(deadline=None, derandomize=True, max_examples=12, database=None)
    @given(kwargs=st.fixed_dictionaries(CASES[name]))
    def law(kwargs: dict[str, Any]) -> None:
        before = jax.config.jax_enable_x64
        jax.config.update("jax_enable_x64", True)
        try:
            theirs = getattr(optax, name)(**kwargs)
            # a float64 count: jax divides an int32 count in float32, also where x64 is on
            expected = [float(theirs(jnp.asarray(count, jnp.float64))) for count in COUNTS]
        finally:
            jax.config.update("jax_enable_x64", before)
        ours = getattr(schedules, name)(**kwargs)
        got = [ours(torch.tensor(count)) for count in COUNTS]
        assert all(value.shape == () and value.dtype == torch.float64 for value in got)
        # both compute in float64, one or two dozen roundings of 1e-16 apart; values are at most 1
        np.testing.assert_allclose([float(value) for value in got], expected, rtol=1e-12, atol=1e-14)
        assert [float(ours(count)) for count in COUNTS] == [float(value) for value in got]
        together = ours(torch.tensor(list(COUNTS)))
        # the vectorised power rounds otherwise than the scalar one
        np.testing.assert_allclose(together.numpy(), [float(value) for value in got], rtol=1e-15, atol=0.0)

    law()


@every_schedule
def test_it_traces_into_one_graph_that_serves_every_step(name: str) -> None:
    schedule = getattr(schedules, name)(**example(name))
    torch._dynamo.reset()
    compiled = torch.compile(schedule, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in COUNTS:
            assert torch.equal(compiled(torch.tensor(count)), schedule(torch.tensor(count)))


def example(name: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = []

    @settings(deadline=None, derandomize=True, max_examples=4, database=None)
    @given(kwargs=st.fixed_dictionaries(CASES[name]))
    def collect(kwargs: dict[str, Any]) -> None:
        found.append(kwargs)

    collect()
    return found[-1]


TENSORS: dict[str, Any] = {
    "constant": lambda x: schedules.constant_schedule(x),
    "linear": lambda x: schedules.linear_schedule(x, x / 10, 9, 2),
    "polynomial": lambda x: schedules.polynomial_schedule(x, x / 10, 1 + x, 9),
    "piecewise": lambda x: schedules.piecewise_constant_schedule(x, {3: 0.5}),
    "exponential": lambda x: schedules.exponential_decay(x, 3, x, end_value=x / 50),
    "cosine": lambda x: schedules.cosine_decay_schedule(x, 9, alpha=x, exponent=1 + x),
    "warmup_cosine": lambda x: schedules.warmup_cosine_decay_schedule(x / 10, x, 2, 9, end_value=x / 5),
    "interpolate": lambda x: schedules.piecewise_interpolate_schedule("cosine", x, {3: 0.5}),
    "onecycle": lambda x: schedules.linear_onecycle_schedule(9, x),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_value_may_be_a_tensor_that_is_vmapped_and_differentiated(name: str) -> None:
    build, points = TENSORS[name], torch.tensor([0.1, 0.4], dtype=torch.float64)
    for count in (0, 1, 5, 20):
        together = torch.func.vmap(lambda x, n=count: build(x)(torch.tensor(n)))(points)
        alone = torch.stack([build(float(x))(count) for x in points])
        torch.testing.assert_close(together, alone, rtol=1e-14, atol=0.0)
        for x in points:
            slope = (build(x + 1e-6)(count) - build(x - 1e-6)(count)) / 2e-6
            # central differences of float64: 1e-12 from the third derivative, 1e-10 from rounding
            torch.testing.assert_close(torch.func.grad(lambda v, n=count: build(v)(n))(x), slope, rtol=1e-7, atol=1e-9)


def test_a_peak_of_zero_has_a_finite_gradient() -> None:
    def value(peak: torch.Tensor) -> torch.Tensor:
        return schedules.warmup_cosine_decay_schedule(0.0, peak, 2, 9, end_value=0.1)(torch.tensor(5))

    assert torch.isfinite(torch.func.grad(value)(torch.tensor(0.0)))


def test_counts_past_what_float32_can_tell_apart_stay_apart() -> None:
    schedule = schedules.linear_schedule(0.0, 1.0, 2**26)
    assert float(schedule(torch.tensor(2**24 + 1))) > float(schedule(torch.tensor(2**24)))


def test_each_joined_schedule_counts_from_its_own_boundary() -> None:
    joined = schedules.join_schedules([lambda t: 1.0, lambda t: 10.0 + t, schedules.constant_schedule(5.0)], [2, 4])
    assert [float(joined(torch.tensor(t))) for t in range(6)] == [1.0, 1.0, 10.0, 11.0, 5.0, 5.0]


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: schedules.join_schedules([lambda t: 1.0], [3]), "1 schedules need 0 boundaries, came 1"),
        (lambda: schedules.cosine_decay_schedule(1.0, 0), "decay_steps must be positive, came 0"),
        (lambda: schedules.piecewise_constant_schedule(1.0, {4: -1.0}), "the scale at step 4 must not be negative"),
        (lambda: schedules.piecewise_interpolate_schedule("spline", 1.0), "choose 'linear' or 'cosine', came 'spline'"),
        (lambda: schedules.linear_onecycle_schedule(0, 1.0), "transition_steps must be positive, came 0"),
    ],
)
def test_what_cannot_be_is_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# ---- what optax does not have ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["triangular", "triangular2", "exp_range"])
@pytest.mark.parametrize(("up", "down"), [(4, None), (3, 5), (1, 2)])
def test_a_cyclical_schedule_is_that_of_torch(mode: str, up: int, down: int | None) -> None:
    make = {
        "triangular": schedules.triangular_schedule,
        "triangular2": schedules.triangular2_schedule,
        "exp_range": functools.partial(schedules.exp_range_schedule, gamma=0.9),
    }[mode]
    schedule = make(0.1, 0.7, up, down)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    theirs = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.1, 0.7, up, down, mode, gamma=0.9, cycle_momentum=False)
    for step in range(3 * (up + (down or up)) + 2):
        # torch takes remainders of quotients: a few roundings of float64
        assert float(schedule(step)) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-12)
        optimizer.step()
        theirs.step()


def test_a_cyclical_schedule_needs_steps() -> None:
    with pytest.raises(ValueError, match="at least one step up and one down, came 0 and 0"):
        schedules.triangular_schedule(0.1, 0.7, 0)


def test_warmup_stable_decay_has_three_parts_and_the_middle_may_grow() -> None:
    schedule = schedules.warmup_stable_decay_schedule(0.0, 2.0, 4, 10, 8, 0.5)
    longer = schedules.warmup_stable_decay_schedule(0.0, 2.0, 4, 20, 8, 0.5)
    steps = torch.arange(14)
    rise = schedules.linear_schedule(0.0, 2.0, 4)
    assert torch.equal(schedule(steps), rise(steps)) and torch.equal(schedule(steps), longer(steps))
    fall = schedules.linear_schedule(2.0, 0.5, 8)
    torch.testing.assert_close(schedule(14 + torch.arange(12)), fall(torch.arange(12)), rtol=1e-14, atol=1e-14)
    assert torch.equal(longer(24 + torch.arange(12)), schedule(14 + torch.arange(12)))


def test_warmup_stable_decay_may_fall_by_a_root_and_have_no_parts() -> None:
    schedule = schedules.warmup_stable_decay_schedule(0.0, 2.0, 0, 0, 16, power=0.5)
    assert [float(schedule(step)) for step in (0, 1, 4, 16, 20)] == [2.0, 1.5, 1.0, 0.0, 0.0]
    constant = schedules.warmup_stable_decay_schedule(0.3, 2.0, 0, 5, 0, 1.0)
    assert [float(constant(step)) for step in (0, 5, 6)] == [2.0, 2.0, 1.0]
    rate = torch.tensor(0.5, dtype=torch.float64)
    slope = torch.func.grad(lambda p: schedules.warmup_stable_decay_schedule(0.0, 2.0, 0, 0, 16, power=p)(4))(rate)
    # d/dp of 2 (1 - 0.25 ** p)
    assert float(slope) == pytest.approx(2 * 0.5 * math.log(4), rel=1e-12)
    with pytest.raises(ValueError, match="came -1, 2 and 3"):
        schedules.warmup_stable_decay_schedule(0.0, 1.0, -1, 2, 3)
