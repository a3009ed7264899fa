"""A second witness for the optimizers that torch does otherwise: NAdam, Adafactor, Muon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import functrain.optim as ours

STEPS = 10
OUTPUTS_FIRST = ours.MuonDimensionNumbers(1, 0)  # torch's weights are (outputs, inputs)


def equals(mine: Any, theirs: Callable[[Any], Any], shapes: list[tuple[int, ...]], tolerance: float) -> None:
    draw = torch.Generator().manual_seed(5)
    params = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    leaves = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer, state = theirs(leaves), mine.init(params)
    for _ in range(STEPS):
        grads = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
        updates, state = mine.update(grads, state, params)
        params = ours.apply_updates(params, updates)
        for leaf, g in zip(leaves, grads, strict=True):
            leaf.grad = g.clone()
        optimizer.step()
    for got, expected in zip(params, leaves, strict=True):
        torch.testing.assert_close(got, expected.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_nadam_is_that_of_torch_once_its_momentum_has_warmed_up(weight_decay: float) -> None:
    # torch takes b1 * (1 - 0.96 ** (t * momentum_decay) / 2) for b1 in front of the moment: with this decay, b1
    settings: Any = dict(momentum_decay=1e6, weight_decay=weight_decay, decoupled_weight_decay=True)
    equals(
        ours.nadamw(0.1, 0.8, 0.9, 1e-3, weight_decay=weight_decay),
        lambda p: torch.optim.NAdam(p, 0.1, (0.8, 0.9), 1e-3, **settings),
        [(3, 2), (4,), ()],
        # torch keeps the product of its momenta in float32
        1e-6,
    )


@pytest.mark.parametrize("decay_rate", [0.8, 0.5])
def test_adafactor_is_that_of_torch(decay_rate: float) -> None:
    equals(
        ours.adafactor(0.05, min_dim_size_to_factor=1, decay_rate=decay_rate),
        lambda p: torch.optim.Adafactor(p, 0.05, beta2_decay=-decay_rate, weight_decay=0.0),
        [(3, 2), (4, 5), (4,)],
        # torch bounds squares by 5e-32 from below where 1e-30 is added here
        1e-12,
    )


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_is_that_of_torch(weight_decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch makes its products in bfloat16, whatever the params are
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())
    equals(
        ours.muon(
            0.1,
            beta=0.9,
            eps=0.0,
            nesterov=False,
            weight_decay=weight_decay,
            muon_weight_dimension_numbers=OUTPUTS_FIRST,
        ),
        lambda p: torch.optim.Muon(p, 0.1, weight_decay, 0.9, nesterov=False),
        [(3, 2), (2, 5), (4, 4)],
        # the steps magnify roundings of 1e-16 by 480
        1e-11,
    )
