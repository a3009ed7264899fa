"""Laws of rotary embeddings; transformers is the witness."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from functrain import nn, random

ORIGINAL = 32


@st.composite
def rotaries(draw: st.DrawFn) -> tuple[nn.Rotary, dict[str, Any]]:
    """A Rotary, and the rope_parameters of transformers that mean the same."""
    kind: Any = draw(st.sampled_from(["default", "linear", "dynamic", "llama3", "yarn"]))
    ours: dict[str, Any] = {"kind": kind, "base": draw(st.sampled_from([100.0, 10000.0, 5e5]))}
    if kind != "default":
        ours["factor"] = draw(st.sampled_from([1.0, 1.5, 8.0]))
    if kind in ("dynamic", "llama3", "yarn"):
        ours["original"] = ORIGINAL
    if kind == "llama3":
        ours |= {"low": draw(st.sampled_from([0.5, 1.0])), "high": draw(st.sampled_from([2.0, 4.0]))}
    theirs = {"rope_type": kind, "rope_theta": ours["base"]}
    if kind == "yarn":
        for name in draw(st.sets(st.sampled_from(["beta_fast", "beta_slow", "attention_factor", "truncate"]))):
            ours[name] = {"beta_fast": 8.0, "beta_slow": 0.5, "attention_factor": 1.3, "truncate": False}[name]
        if draw(st.booleans()):
            ours |= {"mscale": 0.7, "mscale_all": 1.2}
    names = {"original": "original_max_position_embeddings", "low": "low_freq_factor", "high": "high_freq_factor"}
    names |= {"mscale_all": "mscale_all_dim"}
    theirs |= {names.get(name, name): value for name, value in ours.items() if name not in ("kind", "base")}
    if kind == "dynamic":
        del theirs["original_max_position_embeddings"]
    return nn.Rotary(**ours), theirs


@settings(deadline=None, derandomize=True, max_examples=60)
@given(both=rotaries(), width=st.sampled_from([4, 8, 10, 64]), tokens=st.sampled_from([5, ORIGINAL, 50, 200]))
def test_angles_and_what_they_turn_equal_transformers_also_beyond_the_original_context(
    both: tuple[nn.Rotary, dict[str, Any]], width: int, tokens: int
) -> None:
    rotary, theirs = both
    config = transformers.LlamaConfig(
        hidden_size=2 * width, num_attention_heads=2, max_position_embeddings=ORIGINAL, rope_parameters=theirs
    )
    positions = torch.arange(tokens)[None]
    q, k = random.normal(random.key(0), (2, 1, 2, tokens, width)).unbind()
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    ours = nn.rotary_angles(positions, width, rotary)
    # a float32 angle of up to 200 has a rounding of 1.5e-5
    torch.testing.assert_close(ours, (cos[..., : width // 2], sin[..., : width // 2]), rtol=0, atol=4e-5)
    turned = apply_rotary_pos_emb(q, k, cos, sin)
    torch.testing.assert_close((nn.rotate(q, *ours), nn.rotate(k, *ours)), turned, rtol=0, atol=3e-4)


def test_scores_depend_on_the_distance_alone() -> None:
    q, k = random.normal(random.key(1), (2, 1, 1, 1, 8), torch.float64).unbind()

    def score(t: int, s: int) -> torch.Tensor:
        turned = [nn.rotate(x, *nn.rotary_angles(torch.tensor([[p]]), 8)) for x, p in ((q, t), (k, s))]
        return torch.sum(turned[0] * turned[1])

    # float32 angles below 30
    torch.testing.assert_close(score(21, 17), score(9, 5), rtol=1e-5, atol=1e-5)
    assert not torch.isclose(score(21, 17), score(21, 16), rtol=1e-3)


def test_a_row_of_positions_is_turned_as_alone() -> None:
    positions = torch.stack([torch.arange(40), torch.arange(40) % 7])
    for kind in ("default", "dynamic"):
        more: Any = {"factor": 2.0, "original": 16} if kind == "dynamic" else {}
        rotary = nn.Rotary(kind=kind, **more)
        both = nn.rotary_angles(positions, 8, rotary)
        for row in range(2):
            alone = nn.rotary_angles(positions[row], 8, rotary)
            assert all(torch.equal(a[row], b) for a, b in zip(both, alone, strict=True))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"kind": "longrope"}, "a kind of default, linear, dynamic, llama3, yarn, came 'longrope'"),
        ({"kind": "linear"}, "linear: expected factor, came None"),
        ({"kind": "linear", "factor": 2.0, "low": 1.0}, "linear: expected no low, .* leave it out"),
        ({"kind": "yarn", "factor": 0.0, "original": 4}, "expected factor above 0, came 0.0"),
        ({"kind": "llama3", "factor": 2.0, "original": 4, "low": 4.0, "high": 1.0}, "low below high, came 4.0 and 1.0"),
        ({"base": 1.0}, "a base above 1"),
    ],
)
def test_a_rotary_that_cannot_be_says_why(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        nn.Rotary(**fields)


def test_an_odd_width_is_told() -> None:
    with pytest.raises(ValueError, match="an even width of a head, came 5"):
        nn.rotary_angles(torch.arange(3), 5)
