"""How private a run of `private_step` is, and batches for which the answer holds.

The accounting is Google's `dp-accounting`: `pip install 'functrain[privacy]'`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functrain import random


def epsilon(*, noise_multiplier: float, sampling_rate: float, steps: int, delta: float) -> float:
    """Compute the privacy loss: after `steps` steps a run is (epsilon, delta)-differentially private.

    It holds for batches in which each example is with probability `sampling_rate`, independently, as `poisson_rows`
    draws them; neighbours are data sets with one example more or less.

    Source: privacy loss distributions, Doroshenko et al. 2022 (arXiv:2207.04380), by dp-accounting.
    Raises: ValueError for numbers that make no mechanism; ModuleNotFoundError without dp-accounting.
    """
    _check(sampling_rate, steps, delta)
    if not noise_multiplier > 0:
        raise ValueError(
            f"epsilon: expected noise_multiplier > 0, came {noise_multiplier}; without noise it is infinite"
        )
    accounting = _accounting()
    accountant = accounting.pld.PLDAccountant()
    accountant.compose(_event(accounting, noise_multiplier, sampling_rate, steps))
    return float(accountant.get_epsilon(delta))


_exact = epsilon  # for where an argument has its name


def noise_multiplier(*, epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """Compute the smallest noise multiplier with which a run is (epsilon, delta)-differentially private.

    Equals the inverse of `epsilon` to 1e-3.

    Raises: ValueError for numbers that make no mechanism; ModuleNotFoundError without dp-accounting.
    """
    _check(sampling_rate, steps, delta)
    if not epsilon > 0:
        raise ValueError(f"noise_multiplier: expected epsilon > 0, came {epsilon}")
    accounting = _accounting()

    def loss(sigma: float) -> float:
        return _exact(noise_multiplier=sigma, sampling_rate=sampling_rate, steps=steps, delta=delta)

    def sought(accountant: Any, bracket: Any, tolerance: float) -> float:
        def event(sigma: float) -> Any:
            return _event(accounting, sigma, sampling_rate, steps)

        return float(
            accounting.calibrate_dp_mechanism(
                accountant, event, epsilon, delta, bracket_interval=bracket, tol=tolerance
            )
        )

    # Renyi's bound takes milliseconds and is above by some per cent; the exact loss takes a second each time. Orders
    # that are no integers are sums of a series, which fails to converge where there is little noise
    bound = accounting.rdp.RdpAccountant
    above = sought(lambda: bound(_ORDERS), accounting.LowerEndpointAndGuess(0.0, 1.0), 1e-2) + 1e-2
    below = 0.85 * above
    while loss(below) <= epsilon:
        above, below = below, 0.85 * below
    return sought(accounting.pld.PLDAccountant, accounting.ExplicitBracketInterval(below, above), 1e-3)


_ORDERS = [*range(2, 65), 128, 256, 512, 1024]


def poisson_rows(key: Tensor, count: int, sampling_rate: float, capacity: int) -> tuple[Tensor, Tensor]:
    """Draw each of `count` examples with probability `sampling_rate`; return their rows and a mask, both (capacity,).

    Where the mask is False the row is 0 and stands for nothing: give it weight 0 in the loss. The shapes do not depend
    on the draw, so that a compiled step never compiles again. Reads the number drawn to the host.

    Raises: ValueError when more than `capacity` were drawn: a batch that leaves some out is not what is accounted for.
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
