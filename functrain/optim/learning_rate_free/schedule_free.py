"""Schedule-free training: averaging in place of a decaying learning rate."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import functrain.tree as tree
from functrain.optim.combining import chain
from functrain.optim.decay import add_decayed_weights
from functrain.optim.numerics.leafwise import leafwise
from functrain.optim.numerics.moments import accumulator_dtype
from functrain.optim.numerics.safe import (
    device_of,
    lerp,
    like,
    working_dtype,
    zero_count,
)
from functrain.optim.optimizers.rmsprop import scale_by_rms
from functrain.optim.optimizers.sgd import sgd
from functrain.optim.scaling import scale_by_learning_rate
from functrain.optim.transformation import (
    GradientTransformation,
    GradientTransformationExtraArgs,
    OptState,
    Updates,
    check_kind,
    check_params,
    check_trainable,
    with_extra_args_support,
)
from functrain.schedules import Scalar, ScalarOrSchedule, warmup_constant_schedule
from functrain.schedules.schedule import check_number
from functrain.tree import Params


class ScheduleFreeState(NamedTuple):
    b1: Tensor  # ()
    weight_sum: Tensor  # ()
    step_count: Tensor  # (), int64: one more than updates so far
    max_lr: Tensor  # (): the largest learning rate so far
    base_optimizer_state: OptState
    z: Params  # in state_dtype if given: what the base optimizer moves


def schedule_free(
    base_optimizer: GradientTransformation,
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    weight_lr_power: Scalar = 2.0,
    state_dtype: torch.dtype | None = None,
) -> GradientTransformationExtraArgs:
    """Train at a point between z, which the base optimizer moves, and x, the average of all z.

    The params are that point, y = b1 * x + (1 - b1) * z; `schedule_free_eval_params` gives x, to be evaluated. The base
    optimizer has no momentum of its own. `learning_rate` is that of the base optimizer; that of a step weighs its z in
    the average. optax 0.2.8 weighs it by that of the step after, which in a warm-up is another one.

    Source: Defazio et al. 2024 (arXiv:2405.15682).

    Raises: ValueError without params, and for a b1 outside (0, 1]: with 0 the params are z, which tell nothing of x.

    >>> optimizer = ft.optim.schedule_free(ft.optim.sgd(0.5), learning_rate=0.5, b1=0.5)
    >>> params, grads = torch.zeros(1), torch.ones(1)
    >>> updates, state = optimizer.update(grads, optimizer.init(params), params)
    >>> updates, state.z
    (tensor([-0.5000]), tensor([-0.5000]))
    """
    if isinstance(b1, (int, float)) and not 0.0 < b1 <= 1.0:
        raise ValueError(
            f"schedule_free: b1 must be in (0, 1], came {b1}; without averaging, use the base optimizer alone"
        )
    base = with_extra_args_support(base_optimizer)

    def init(params: Params) -> ScheduleFreeState:
        check_trainable(params)
        zero = torch.zeros((), dtype=working_dtype(params), device=device_of(params))
        z = tree.map(lambda p: p.to(accumulator_dtype(p, state_dtype), copy=True), params)
        first = zero_count(params) + 1
        return ScheduleFreeState(zero + like(b1, zero), zero, first, zero.clone(), base.init(params), z)

    def update(
        updates: Updates, state: ScheduleFreeState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, ScheduleFreeState]:
        check_kind("schedule_free", state, ScheduleFreeState)
        check_params(params, "schedule_free")
        rate = (
            learning_rate(state.step_count - 1)
            if callable(learning_rate)
            else check_number("schedule_free: learning_rate", learning_rate)
        )
        max_lr = torch.maximum(
            state.max_lr, torch.as_tensor(rate, dtype=state.max_lr.dtype, device=state.max_lr.device)
        )
        weight = max_lr ** like(weight_lr_power, max_lr)
        total = state.weight_sum + weight
        # a weight of 0 at a learning rate of 0 leaves the average alone; NaN goes on to be seen
        share = torch.where(total == 0, 0.0, weight / torch.where(total == 0, 1.0, total))
        moves, base_state = base.update(updates, state.base_optimizer_state, params, **extra_args)

        def step(u: Tensor, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            x = like(1 / b1, y) * (y - like(1 - b1, y) * z)
            z = z + u
            x = lerp(x, z, share)
            return (lerp(z, x, b1) - y).to(y.dtype), z

        new, (z,) = leafwise(step, moves, (state.z,), params)
        return new, ScheduleFreeState(state.b1, total, state.step_count + 1, max_lr, base_state, z)

    return GradientTransformationExtraArgs(init, update)


def schedule_free_eval_params(state: ScheduleFreeState, params: Params) -> Params:
    """Return the average x that goes with the params y, to be evaluated.

    Raises: TypeError for a state of another transformation.

    >>> optimizer, params = ft.optim.schedule_free_sgd(0.5, b1=0.5), torch.zeros(1)
    >>> state = optimizer.init(params)
    >>> for _ in range(2):
    ...     updates, state = optimizer.update(torch.ones(1), state, params)
    ...     params = params + updates
    >>> params, ft.optim.schedule_free_eval_params(state, params)
    (tensor([-0.8750]), tensor([-0.7500]))
    """
    if not isinstance(state, ScheduleFreeState):
        raise TypeError(f"schedule_free_eval_params: expected a ScheduleFreeState, came {type(state).__name__}")
    b1 = state.b1
    return tree.map(lambda y, z: ((y - like(1 - b1, y) * z) / like(b1, y)).to(y.dtype), params, state.z, by_kind=True)


def schedule_free_sgd(
    learning_rate: Scalar = 1.0,
    warmup_steps: int | None = None,
    b1: Scalar = 0.9,
    weight_decay: ScalarOrSchedule | None = None,
    weight_lr_power: Scalar = 2.0,
    state_dtype: torch.dtype | None = None,
) -> GradientTransformationExtraArgs:
    """Schedule-free SGD, with a warm-up if wanted.

    >>> optimizer, params = ft.optim.schedule_free_sgd(0.5, b1=0.5), torch.tensor([1.0, -2.0])
    >>> optimizer.update(2 * params, optimizer.init(params), params)[0]
    tensor([-1.,  2.])
    """
    rate = learning_rate if warmup_steps is None else warmup_constant_schedule(0.0, learning_rate, warmup_steps)
    base = sgd(rate) if weight_decay is None else chain(add_decayed_weights(weight_decay), sgd(rate))
    return schedule_free(base, rate, b1, weight_lr_power, state_dtype)


def schedule_free_adamw(
    learning_rate: Scalar = 0.0025,
    warmup_steps: int | None = None,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_lr_power: Scalar = 2.0,
    state_dtype: torch.dtype | None = None,
) -> GradientTransformationExtraArgs:
    """Schedule-free AdamW, with a warm-up if wanted.

    >>> optimizer, params = ft.optim.schedule_free_adamw(0.1), torch.tensor([1.0, -2.0])
    >>> optimizer.update(2 * params, optimizer.init(params), params)[0]
    tensor([-0.1000,  0.1000])
    """
    rate = learning_rate if warmup_steps is None else warmup_constant_schedule(0.0, learning_rate, warmup_steps)
    base = chain(
        scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True),
        add_decayed_weights(weight_decay),
        scale_by_learning_rate(rate),
    )
    return schedule_free(base, rate, b1, weight_lr_power, state_dtype)
