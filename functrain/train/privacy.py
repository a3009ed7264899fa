"""How private a run of `private_step` is, and batches for which the answer holds.

The accounting is Google's `dp-accounting`: `pip install 'functrain[privacy]'`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrain import random
from functrain.tree import elsewhere

__all__ = ["epsilon", "noise_multiplier", "poisson_rows"]


def epsilon(*, noise_multiplier: float, sampling_rate: float, steps: int, delta: float) -> float:
    """Compute the privacy loss: after `steps` steps a run is (epsilon, delta)-differentially private.

    It holds for batches in which each example is with probability `sampling_rate`, independently, as `poisson_rows`
    draws them; neighbours are data sets with one example more or less.

    Equals an upper bound: the distribution stands on a grid, rounded to the safe side, which is made finer until
    epsilon falls by less than 5e-4 of itself, or until it is 1e-4 in the privacy loss.

    Source: privacy loss distributions, Doroshenko et al. 2022 (arXiv:2207.04380), by dp-accounting.
    Raises: ValueError for numbers that make no mechanism; ModuleNotFoundError without dp-accounting.

    >>> round(ft.train.privacy.epsilon(noise_multiplier=4.0, sampling_rate=1.0, steps=1, delta=1e-5), 3)
    0.926
    """
    _check(sampling_rate, steps, delta)
    if not noise_multiplier > 0:
        raise ValueError(
            f"epsilon: expected noise_multiplier > 0, came {noise_multiplier}; without noise it is infinite"
        )
    accounting = _accounting()
    return _settled(accounting, _event(accounting, noise_multiplier, sampling_rate, steps), delta)


def noise_multiplier(*, epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """Compute the smallest noise multiplier with which a run is (epsilon, delta)-differentially private.

    Equals the inverse of `epsilon`, whose value for it is at most the one wished and at least 0.999 of it.

    Raises: ValueError for numbers that make no mechanism; ModuleNotFoundError without dp-accounting.

    >>> round(ft.train.privacy.noise_multiplier(epsilon=1.0, delta=1e-5, sampling_rate=1.0, steps=1), 2)
    3.73
    """
    _check(sampling_rate, steps, delta)
    if not epsilon > 0:
        raise ValueError(f"noise_multiplier: expected epsilon > 0, came {epsilon}")
    accounting = _accounting()

    def event(sigma: float) -> Any:
        return _event(accounting, sigma, sampling_rate, steps)

    # Renyi's bound takes milliseconds and is above by some per cent, at the extremes by three times. Orders that are no
    # integers are sums of a series, which fails to converge where there is little noise; the highest bounds what is
    # reached
    reached = max(epsilon, 2 * math.log(1 / delta) / max(_ORDERS))
    bound = accounting.calibrate_dp_mechanism(
        lambda: accounting.rdp.RdpAccountant(_ORDERS),
        event,
        reached,
        delta,
        bracket_interval=accounting.LowerEndpointAndGuess(0.0, 1.0),
        tol=1e-2,
    )
    begin = bound * reached / epsilon
    coarse, slope = _inverse(lambda sigma: _loss(accounting, event(sigma), delta, _GRIDS[1]), epsilon, begin, -1.5)
    # both are above
    return _inverse(lambda sigma: _settled(accounting, event(sigma), delta), epsilon, min(begin, coarse), slope)[0]


_ORDERS = [*range(2, 65), 128, 256, 512, 1024]
_GRIDS = [1e-2, 3e-3, 1e-3, 3e-4, 1e-4]  # of the privacy loss; the error is as the square, the time as the inverse


def _settled(accounting: Any, event: Any, delta: float) -> float:
    last = math.inf
    for grid in _GRIDS:
        loss = _loss(accounting, event, delta, grid)
        if last - loss <= 5e-4 * loss:
            break
        last = loss
    return loss


def _loss(accounting: Any, event: Any, delta: float, grid: float) -> float:
    accountant = accounting.pld.PLDAccountant(value_discretization_interval=grid)
    accountant.compose(event)
    return float(accountant.get_epsilon(delta))


def _inverse(loss: Callable[[float], float], wished: float, sigma: float, slope: float) -> tuple[float, float]:
    """Find where the falling `loss` is at most `wished` and at least 0.999 of it, by secants of the logarithms.

    Returns the place and the slope there, and begins with such ones.
    """
    at, last = math.log(sigma), None
    low, high = -math.inf, math.inf  # too little noise at `low`, enough at `high`
    for count in itertools.count(1):
        came = loss(math.exp(at))
        low, high = (at, high) if came > wished else (low, at)
        ahead = math.log(min(max(came / wished, 0.25), 4.0))  # it may be 0 or infinite
        if last is not None:
            slope = min((ahead - last[1]) / (at - last[0]), -0.5)
        if 0.999 * wished <= came <= wished or high - low < 1e-5:  # or it jumps here
            break
        last = at, ahead
        at += (math.log(0.9995) - ahead) / slope
        if not low < at < high or (count % 4 == 0 and high - low < math.inf):
            at = (low + high) / 2
    return math.exp(high), slope


def poisson_rows(key: Tensor, count: int, sampling_rate: float, capacity: int) -> tuple[Tensor, Tensor]:
    """Draw each of `count` examples with probability `sampling_rate`; return their rows and a mask, both (capacity,).

    Where the mask is False the row is 0 and stands for nothing: give it weight 0 in the loss. The shapes do not depend
    on the draw, so that a compiled step never compiles again. Reads the number drawn to the host.

    Raises: ValueError when more than `capacity` were drawn: a batch that leaves some out is not what is accounted for.

    >>> rows, mask = ft.train.privacy.poisson_rows(ft.random.key(0), count=8, sampling_rate=1.0, capacity=10)
    >>> rows.tolist(), mask.tolist().count(True)
    ([0, 1, 2, 3, 4, 5, 6, 7, 0, 0], 8)
    """
    drawn = torch.nonzero(random.bernoulli(key, sampling_rate, (count,))).squeeze(1)
    if len(drawn) > capacity:
        raise ValueError(
            f"poisson_rows: {len(drawn)} examples were drawn, more than capacity={capacity}; "
            f"choose some deviations more than the mean {count * sampling_rate:.0f}"
        )
    rows = torch.zeros(capacity, dtype=torch.int64, device=key.device)
    rows[: len(drawn)] = drawn
    return rows, torch.arange(capacity, device=key.device) < len(drawn)


def _event(accounting: Any, sigma: float, sampling_rate: float, steps: int) -> Any:
    step = accounting.PoissonSampledDpEvent(sampling_rate, accounting.GaussianDpEvent(sigma))
    return accounting.SelfComposedDpEvent(step, steps)


def _check(sampling_rate: float, steps: int, delta: float) -> None:
    if not 0 < sampling_rate <= 1:
        raise ValueError(f"privacy: expected sampling_rate in (0, 1], came {sampling_rate}: batch size / examples")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"privacy: expected steps >= 1, came {steps!r}")
    if not 0 < delta < 1:
        raise ValueError(f"privacy: expected delta in (0, 1), came {delta}; choose less than 1 / examples")


def _accounting() -> Any:
    try:
        import dp_accounting
        from dp_accounting import pld, rdp  # noqa: F401  # the package does not import its parts itself
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "privacy: the privacy loss is computed by dp-accounting, which is not installed; "
            "pip install 'functrain[privacy]'",
            name=error.name,
        ) from error
    return dp_accounting


elsewhere.furnish(__name__)
