"""Schedules: functions of the step count, with optax's names and arguments.

A schedule takes the number of steps done, an int or an integer tensor of any shape, and returns a tensor of that
shape, () for one count. It computes in float64, because float32 cannot tell step 16777217 from 16777216 and loses the
tail of a cosine to cancellation; who uses the value casts it. Values may be floats or () tensors, which can be vmapped
over and differentiated through; numbers of steps are ints.
"""

from functrain.schedules.averages import ema_warmup
from functrain.schedules.cyclic import exp_range_schedule, triangular2_schedule, triangular_schedule
from functrain.schedules.from_optax import (
    constant_schedule,
    cosine_decay_schedule,
    exponential_decay,
    join_schedules,
    linear_schedule,
    polynomial_schedule,
    sgdr_schedule,
    warmup_constant_schedule,
    warmup_cosine_decay_schedule,
    warmup_exponential_decay_schedule,
)
from functrain.schedules.piecewise import (
    cosine_onecycle_schedule,
    linear_onecycle_schedule,
    piecewise_constant_schedule,
    piecewise_interpolate_schedule,
)
from functrain.schedules.schedule import Count, Scalar, ScalarOrSchedule, Schedule
from functrain.schedules.stable import warmup_stable_decay_schedule
from functrain.tree import elsewhere

__all__ = [
    "Count", "Scalar", "ScalarOrSchedule", "Schedule", "constant_schedule", "cosine_decay_schedule",
    "cosine_onecycle_schedule", "ema_warmup", "exp_range_schedule", "exponential_decay", "join_schedules",
    "linear_onecycle_schedule", "linear_schedule", "piecewise_constant_schedule",
    "piecewise_interpolate_schedule", "polynomial_schedule",
    "sgdr_schedule", "triangular2_schedule", "triangular_schedule", "warmup_constant_schedule",
    "warmup_cosine_decay_schedule", "warmup_exponential_decay_schedule", "warmup_stable_decay_schedule",
]  # fmt: skip

elsewhere.furnish(__name__)
