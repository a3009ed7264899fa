"""Laws of functrain.generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpt2_witness import CONFIG, draw_params, draw_tokens, their_model
from hypothesis import given, settings
from hypothesis import strategies as st
from later import Later
from torch import Tensor

from functrain import random, tree
from functrain.generation import generate
from functrain.models import gpt2

transformers = Later("transformers")

PARAMS = draw_params(CONFIG)
law = settings(deadline=None, derandomize=True, max_examples=10)


def without_cache(tokens: Tensor, steps: int) -> Tensor:
    """Greedy text from `apply` on what the model is to see: all, and at a full context the last half of it."""
    seen = tokens[:, -CONFIG.context :]
    for _ in range(steps):
        if seen.shape[1] > CONFIG.context:
            seen = seen[:, -(CONFIG.context // 2) :]
        chosen = gpt2.apply(PARAMS, seen, CONFIG)[:, -1].argmax(-1, keepdim=True)
        seen, tokens = torch.cat([seen, chosen], 1), torch.cat([tokens, chosen], 1)
    return tokens


@law
@given(seed=st.integers(0, 10**6), prompt=st.integers(1, 30), steps=st.integers(0, 20))
def test_greedy_with_a_cache_equals_greedy_without(seed: int, prompt: int, steps: int) -> None:
    tokens = draw_tokens(2, prompt, seed)
    assert torch.equal(generate(gpt2, PARAMS, tokens, CONFIG, steps=steps, temperature=0), without_cache(tokens, steps))


def test_greedy_equals_transformers() -> None:
    tokens = draw_tokens(3, 4)
    theirs = their_model(PARAMS, CONFIG).generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    assert torch.equal(generate(gpt2, PARAMS, tokens, CONFIG, steps=8, temperature=0), theirs)


@law
@given(
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.7, 1.0, 2.0]),
    top_k=st.sampled_from([None, 3, 100]),
    top_p=st.sampled_from([None, 0.6, 1.0]),
)
def test_sampling_is_a_function_of_the_key_and_a_row_alone_equals_its_lane(
    seed: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    tokens, keys = draw_tokens(3, 2, seed), random.split(random.key(seed), 3)
    text = generate(gpt2, PARAMS, tokens, CONFIG, keys, steps=14, **options)
    assert torch.equal(text[:, :2], tokens) and text.shape == (3, 16)
    assert torch.equal(text, generate(gpt2, PARAMS, tokens, CONFIG, random.key(seed), steps=14, **options))
    assert torch.equal(text[1:2], generate(gpt2, PARAMS, tokens[1:2], CONFIG, keys[1:2], steps=14, **options))
    assert torch.equal(text[:, :9], generate(gpt2, PARAMS, tokens, CONFIG, keys, steps=7, **options))
    other = generate(gpt2, PARAMS, tokens, CONFIG, random.key(seed + 1), steps=14, temperature=temperature)
    assert not torch.equal(text, other)


@law
@given(seed=st.integers(0, 10**6), narrow=st.sampled_from([{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}]))
def test_sampling_as_narrow_as_can_be_is_greedy(seed: int, narrow: dict[str, float]) -> None:
    tokens = draw_tokens(2, 3, seed)
    narrowed = generate(gpt2, PARAMS, tokens, CONFIG, random.key(seed), steps=5, **narrow)
    assert torch.equal(narrowed, generate(gpt2, PARAMS, tokens, CONFIG, steps=5, temperature=0))


@law
@given(
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    top_k=st.sampled_from([None, 1, 4, 50]),
    top_p=st.sampled_from([None, 0.1, 0.5, 0.9, 1.0]),
)
def test_the_distribution_equals_transformers(
    seed: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    logits = random.normal(random.key(seed), (1, 12), torch.float64) * 2

    class Fixed:
        """A model that always has these logits, for every row."""

        init_cache = staticmethod(lambda config, batch, dtype, device: None)
        apply_cached = staticmethod(lambda params, tokens, cache, config: (logits.expand(len(tokens), 1, 12), 0))

    points = 2000  # rows whose draws are spread evenly over [0, 1)
    with pytest.MonkeyPatch.context() as patch:
        spread = iter((torch.arange(points, dtype=torch.float64)[:, None] + 0.5) / points)
        patch.setattr(random, "uniform", lambda key, shape, dtype: next(spread))
        text = generate(
            Fixed, [logits], torch.zeros(points, 1, dtype=torch.int64), CONFIG, random.key(0),
            steps=1, temperature=temperature, top_k=top_k, top_p=top_p,
        )  # fmt: skip
    warped = logits / temperature
    if top_k is not None:
        warped = transformers.TopKLogitsWarper(top_k)(None, warped)
    if top_p is not None:
        warped = transformers.TopPLogitsWarper(top_p)(None, warped)
    shares = torch.bincount(text[:, 1], minlength=12) / points
    # a token's share of evenly spread draws is its probability to one draw at either end
    assert torch.all((shares - torch.softmax(warped, -1)).abs() <= 1.01 / points)


def test_generation_leaves_the_prompt_and_gradients_alone() -> None:
    tokens = draw_tokens(2, 3)
    before = tokens.clone()
    params = tree.map(lambda leaf: leaf.clone().requires_grad_(), PARAMS)
    text = generate(gpt2, params, tokens, CONFIG, steps=2, temperature=0)
    assert torch.equal(tokens, before) and not text.requires_grad and text.dtype == tokens.dtype
    half = generate(gpt2, tree.cast(PARAMS, torch.bfloat16), tokens, CONFIG, steps=2, temperature=0)
    assert half.shape == (2, 5)


def test_what_cannot_be_generated_is_named() -> None:
    tokens, key = draw_tokens(2, 3), random.key(0)
    for change, message in [
        ({"temperature": -1.0}, "temperature of at least 0, came -1.0"),
        ({"top_k": 0}, "top_k of at least 1, came 0"),
        ({"top_p": 0.0}, r"top_p in \(0, 1\], came 0.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            generate(gpt2, PARAMS, tokens, CONFIG, key, steps=1, **change)
    with pytest.raises(ValueError, match=r"a key \(2,\) or 2 keys \(2, 2\), came \(3, 2\)"):
        generate(gpt2, PARAMS, tokens, CONFIG, random.split(key, 3), steps=1)
    with pytest.raises(ValueError, match=r"at least one token, came \(2, 0\)"):
        generate(gpt2, PARAMS, tokens[:, :0], CONFIG, steps=1, temperature=0)
    with pytest.raises(ValueError, match="needs a key, came None; pass one, or temperature=0"):
        generate(gpt2, PARAMS, tokens, CONFIG, steps=1)
    broken = tree.set_at(PARAMS, "blocks/1/mlp/up/bias", PARAMS["blocks"][1]["mlp"]["up"]["bias"] * torch.nan)
    with pytest.raises(FloatingPointError, match="logits are NaN"):
        generate(gpt2, broken, tokens, CONFIG, steps=1, temperature=0)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"tokens": "a text"}, TypeError, r"expected a prompt \(B, T\), an integer tensor, came str; encode a text as"),
        ({"tokens": [1, 2]}, TypeError, "an integer tensor, came list"),
        ({"tokens": torch.zeros(1, 2)}, TypeError, "expected a prompt of integers, came torch.float32"),
        ({"tokens": torch.zeros(2, dtype=torch.int64)}, ValueError, r"came \(2,\); a single one is tokens\[None\]"),
        ({"tokens": torch.full((1, 2), 7)}, IndexError, r"expected tokens in \[0, 7\), .* came 7"),
        ({"steps": -1}, ValueError, "expected steps of at least 0, came -1"),
        ({"steps": 2.5}, TypeError, "expected steps to be an int, came float 2.5"),
        ({"steps": None}, TypeError, "expected steps to be an int, came NoneType"),
        ({"top_k": 2.5}, TypeError, "expected top_k to be an int, came float 2.5; None draws among all"),
        ({"top_k": "2"}, TypeError, "expected top_k to be an int, came str"),
        ({"top_k": True}, TypeError, "expected top_k to be an int, came bool"),
        ({"top_p": "0.5"}, TypeError, "expected top_p to be a number, came str"),
        ({"temperature": None}, TypeError, "expected temperature to be a number, came NoneType"),
        ({"key": 0}, TypeError, r"expected a key, as ft.random.key\(0\) makes it, came int 0"),
    ],
)
def test_arguments_of_another_kind_are_told(options: dict[str, Any], error: type[Exception], says: str) -> None:
    config = gpt2.Config(vocab=7, context=8, layers=1, heads=1, width=4)
    params = gpt2.init(config, random.key(0))
    options = {"tokens": torch.zeros(1, 2, dtype=torch.int64), "key": random.key(1), "steps": 2} | options
    tokens, key = options.pop("tokens"), options.pop("key")
    with pytest.raises(error, match=says):
        generate(gpt2, params, tokens, config, key, **options)
