"""What a transformer is said to compute is what torch counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import functrain as ft
from functrain.models import bert, gpt2, llama, modernbert


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


TOKENS = torch.arange(32).reshape(2, 16)
CONFIGS = {
    "gpt2": gpt2.Config(vocab=50, context=16, layers=3, heads=2, width=24, attention="math"),
    "llama": llama.Config(
        vocab=50, context=16, layers=2, heads=4, key_heads=2, head_width=8, width=24, inner=20, attention="math"
    ),
    "llama, tied, one head of keys": llama.Config(
        vocab=50, context=16, layers=2, heads=2, key_heads=1, width=24, inner=20, tied=True, attention="math"
    ),
    "bert": bert.Config(
        vocab=50, context=16, layers=2, heads=2, width=24, inner=32, head="masked_lm", attention="math"
    ),
    "bert of tokens": bert.Config(
        vocab=50, context=16, layers=2, heads=2, width=24, inner=32, head="token", num_labels=3, attention="math"
    ),
    "modernbert": modernbert.Config(vocab=50, context=16, layers=2, heads=2, width=24, inner=32, attention="math"),
    "modernbert, a decoder of its own": modernbert.Config(
        vocab=50, context=16, layers=2, heads=2, width=24, inner=32, window=4, tied=False, attention="math"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_the_flops_of_a_config_are_those_that_torch_counts(name: str) -> None:
    config: Any = CONFIGS[name]
    module: Any = next(m for m in (gpt2, llama, bert, modernbert) if isinstance(config, m.Config))
    params = module.init(config, ft.random.key(0))
    with FlopCounterMode(display=False) as counted:
        ft.grad(lambda params: module.apply(params, TOKENS, config).sum())(params)
    assert counted.get_total_flops() == pytest.approx(32 * ft.models.training_flops_of(config), rel=0.0)


def test_of_experts_those_count_that_a_token_goes_through() -> None:
    shape: Any = {"vocab": 50, "context": 16, "layers": 2, "heads": 2, "width": 24, "inner": 20}
    dense = ft.models.training_flops_of(llama.Config(**shape))
    two = ft.models.training_flops_of(llama.Config(**shape, experts=8, experts_per_token=2))
    # another MLP a layer, and the router
    assert two - dense == 6 * 2 * (3 * 24 * 20 + 24 * 8)


def test_a_head_that_sees_the_first_token_alone_and_another_context_count() -> None:
    shape: Any = {"vocab": 50, "context": 16, "layers": 2, "heads": 2, "width": 24, "inner": 32}
    first = [ft.models.training_flops_of(modernbert.Config(**shape, head=head)) for head in ("none", "sequence")]
    assert first[0] == first[1]
    none, sequence, pretraining = (
        ft.models.training_flops_of(bert.Config(**shape, head=head)) for head in ("none", "sequence", "pretraining")
    )
    assert none == sequence and pretraining - none == 6 * (50 * 24 + 24 * 24)  # the table, and the transform before it
    config = CONFIGS["gpt2"]
    assert ft.models.training_flops_of(config) - ft.models.training_flops_of(config, 8) == 12 * 3 * 24 * 8  # type: ignore[arg-type]


def test_a_config_of_something_else_is_told() -> None:
    with pytest.raises(
        TypeError, match="the Config of gpt2, llama, bert or modernbert, came dict; count the parameters"
    ):
        ft.models.training_flops_of({})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["bert", "modernbert", "modernbert, a decoder of its own"])
def test_logits_of_some_places_count_by_them(name: str) -> None:
    config: Any = CONFIGS[name]
    module: Any = bert if isinstance(config, bert.Config) else modernbert
    params, places = module.init(config, ft.random.key(0)), torch.tensor([[3, 5, 0], [1, 2, 9]])
    with FlopCounterMode(display=False) as counted:
        ft.grad(lambda params: module.apply(params, TOKENS, config, places=places).sum())(params)
    assert counted.get_total_flops() == pytest.approx(
        32 * ft.models.training_flops_of(config, predictions=3), rel=1e-12
    )
    for other in (CONFIGS["gpt2"], CONFIGS["bert of tokens"]):
        with pytest.raises(ValueError, match="expected no predictions of a model that takes no places, came 3"):
            ft.models.training_flops_of(other, predictions=3)  # type: ignore[arg-type]
