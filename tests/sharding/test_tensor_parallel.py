"""Layers that compute with parts, tokens that are split between them, a vocabulary in parts: the step is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import layers
import pytest
import torch
from ranks import Ranks
from test_data_parallel import assert_equal

import functrain as ft


def train(mesh: dict[str, int], name: str, options: dict[str, Any]) -> Any:
    return layers.train(mesh, name, **options)


def compared(ranks: Ranks, mesh: dict[str, int], name: str, options: dict[str, Any], slices: int = 1) -> None:
    found = ranks.run(train, mesh, name, options)
    options = {key: value for key, value in options.items() if key not in ("stream", "programs")}
    wanted = train({"data": 1}, name, options | {"accumulate": slices * options.get("accumulate", 1)})
    assert_equal([(state, seen) for state, seen, _ in found], wanted[:2])


# an image's 16 patches and the token of its class do not divide
STREAMS = [(name, stream) for name in layers.CONFIGS for stream in (False, True) if (name, stream) != ("vit", True)]


@pytest.mark.parametrize(("name", "stream"), STREAMS)
def test_a_model_in_parts_takes_the_same_step(two: Ranks, name: str, stream: bool) -> None:
    compared(two, {"tensor": 2}, name, {"stream": stream})


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"recompute": True}, {"scaled": True}])
def test_options_mean_the_same(two: Ranks, options: dict[str, Any]) -> None:
    compared(two, {"tensor": 2}, "gpt2", {"stream": True, **options})


@pytest.mark.parametrize(("name", "stream"), [("gpt2", True), ("llama", True), ("bert", False)])
def test_with_fsdp_too(four: Ranks, name: str, stream: bool) -> None:
    compared(four, {"fsdp": 2, "tensor": 2}, name, {"stream": stream}, slices=2)


def test_with_data_parallel_ranks_beside(four: Ranks) -> None:
    compared(four, {"data": 2, "tensor": 2}, "gpt2", {"stream": True}, slices=2)


def test_four_ranks_along_the_axis(four: Ranks) -> None:
    compared(four, {"tensor": 4}, "gpt2", {"stream": True})


def test_compiled_it_is_the_same(two: Ranks, tmp_path: Path) -> None:
    compared(two, {"tensor": 2}, "gpt2", {"stream": True, "programs": str(tmp_path)})


def test_a_rank_has_a_part_of_params_and_moments(two: Ranks, four: Ranks) -> None:
    whole = train({"data": 1}, "gpt2", {})[2]
    for *_, here in two.run(train, {"tensor": 2}, "gpt2", {}):
        assert here < 0.6 * whole  # norms, positions and biases of rows are whole
    for *_, here in four.run(train, {"fsdp": 2, "tensor": 2}, "gpt2", {}):
        assert here < 0.32 * whole


def test_each_layer_is_the_whole_one(two: Ranks) -> None:
    assert all(all(found) for found in two.run(layers.layer_by_layer))


def test_what_does_not_fit_together_is_told(two: Ranks) -> None:
    for said in two.run(layers.refusals):
        assert "a/weight: expected a bias that tensor splits as the columns of its weight, came a whole one" in said[0]
        assert "a/bias: expected a whole bias of a weight whose rows are split" in said[1]
        assert "a/weight: expected the 2 columns that this rank has of its input, came 4" in said[2]
        for text in said[3:5]:
            assert "sharding: a stays split along tensor, which is known to ft.nn.linear" in text
        assert "a: expected rows of the vocabulary to be split, came columns" in said[5]
        assert "expected attention to see all tokens, came the 2 of this rank" in said[6]
        assert "tokens that divide by 2, the ranks along tensor, came (2, 3, 4)" in said[7]
        assert "expected an axis of the mesh tensor=2, came 'x'" in said[8]
        assert "expected an axis tensor= beside stream" in said[9]


def test_parts_of_a_dimension(two: Ranks) -> None:
    assert repr(ft.sharding.P("fsdp", ft.sharding.parts("tensor", 3))) == "P('fsdp', parts('tensor', 3))"
    with pytest.raises(ValueError, match="parts: expected 2 parts or more, came 1"):
        ft.sharding.parts("tensor", 1)
    for found in two.run(parts):
        here, whole, said = found
        assert torch.equal(whole, torch.arange(12.0)) and said[0] == "P('fsdp', parts('tensor', 3))"
        assert here in ([0.0, 1.0, 4.0, 5.0, 8.0, 9.0], [2.0, 3.0, 6.0, 7.0, 10.0, 11.0])
        assert "w: expected dimension 0 of (8,) to divide by 6, the ranks along tensor in each part, came 8" in said[1]


def parts() -> Any:
    rule = ft.sharding.P(ft.sharding.parts("tensor", 3))
    plan = ft.sharding.Plan({"tensor": 2}, [("**", rule)], tensor="tensor", device="cpu")
    split = plan.shard({"w": torch.arange(12.0)})
    try:
        plan.shard({"w": torch.arange(8.0)})
        said = ""
    except ValueError as error:
        said = str(error)
    shown = repr(ft.sharding.P("fsdp", ft.sharding.parts("tensor", 3)))
    return split["w"].to_local().tolist(), plan.whole(split)["w"], [shown, said]
