"""What a transformer is said to compute is what torch counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import functrain as ft
from functrain.models import gpt2


def test_the_flops_of_a_token_are_those_that_torch_counts() -> None:
    config = gpt2.Config(vocab=50, context=16, layers=3, heads=2, width=24, attention="math")
    params = gpt2.init(config, ft.random.key(0))
    tokens = torch.arange(32).reshape(2, 16)

    def loss_fn(params: ft.tree.Params) -> torch.Tensor:
        return gpt2.apply(params, tokens, config).sum()

    with FlopCounterMode(display=False) as counted:
        ft.grad(loss_fn)(params)
    # vectors, of norms and biases, are added and not multiplied by matrices
    multiplied = sum(leaf.numel() for path, leaf in ft.tree.items(params) if leaf.dim() > 1 and path != "wpe")
    said = 32 * ft.models.training_flops(parameters=multiplied, layers=3, width=24, context=16)
    assert counted.get_total_flops() == pytest.approx(said, rel=0.0)
