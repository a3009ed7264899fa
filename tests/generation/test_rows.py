"""Rows of different length, and where they end; transformers is the witness."""

from __future__ import annotations

import dataclasses
from typing import Any

import gpt2_witness
import llama_witness
import pytest
import torch
from gpt2_witness import CONFIG, draw_params, draw_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from functrain import nn, random
from functrain.generation import generate, stream
from functrain.models import gpt2, llama

GPT2 = draw_params(CONFIG)
WINDOWED = llama.Config(
    vocab=17, context=40, layers=2, heads=4, key_heads=2, width=16, inner=12, head_width=6, window=4, qkv_bias=True,
    window_layers=(1,), rope=nn.Rotary(kind="yarn", factor=4.0, original=8),
)  # fmt: skip
LLAMA = llama_witness.shaken(WINDOWED)
MODELS: dict[str, Any] = {"gpt2": (gpt2, GPT2, CONFIG), "llama": (llama, LLAMA, WINDOWED)}


def padded(lengths: list[int], seed: int) -> tuple[Tensor, Tensor]:
    tokens = draw_tokens(len(lengths), max(lengths), seed)
    mask = torch.arange(tokens.shape[1]) >= tokens.shape[1] - torch.tensor(lengths)[:, None]
    return torch.where(mask, tokens, 0), mask


def greedily(model: Any, params: Any, config: Any, tokens: Tensor, mask: Tensor, steps: int, **options: Any) -> Tensor:
    return generate(model, params, tokens, config, steps=steps, temperature=0, mask=mask, **options)


@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None, derandomize=True, max_examples=6)
@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3), data=st.data())
def test_a_row_alone_equals_the_row_in_its_batch(name: str, seed: int, lengths: list[int], data: st.DataObject) -> None:
    model, params, config = MODELS[name]
    tokens, mask = padded(lengths, seed)
    keys = random.split(random.key(seed), len(lengths))
    options = {"steps": 6, "end": data.draw(st.sampled_from([None, 3, (3, 5, 8)])), "temperature": 0.7}
    text = generate(model, params, tokens, config, keys, mask=mask, **options)
    for row, length in enumerate(lengths):
        alone = generate(model, params, tokens[row : row + 1, -length:], config, keys[row : row + 1], **options)
        # drawn from probabilities that differ in float32 rounding: no point of these lies so close to an edge
        assert torch.equal(text[row, tokens.shape[1] :], alone[0, length:])


def test_rows_are_padded_also_when_the_context_is_full() -> None:
    tokens, mask = padded([2, 9, 12], 5)
    text = greedily(gpt2, GPT2, CONFIG, tokens, mask, 20)
    full = generate(gpt2, GPT2, tokens[2:], CONFIG, steps=20, temperature=0)
    assert torch.equal(text[2:], full)


@pytest.mark.parametrize("name", MODELS)
def test_a_row_ends_with_its_end_and_is_filled_up(name: str) -> None:
    model, params, config = MODELS[name]
    tokens, mask = padded([3, 5, 4], 2)
    whole = greedily(model, params, config, tokens, mask, 6)
    end = int(whole[1, 6])
    text = greedily(model, params, config, tokens, mask, 6, end=[end, 16], padding=1)
    for row in range(3):
        new = whole[row, 5:].tolist()
        stop = next((i + 1 for i, token in enumerate(new) if token in (end, 16)), len(new))
        assert text[row, 5:].tolist() == new[:stop] + [1] * (6 - stop)
    ours = [column.tolist() for column in stream(
        model, params, tokens[1:2], config, steps=6, temperature=0, mask=mask[1:2], end=end
    )]  # fmt: skip
    assert len(ours) == whole[1, 5:].tolist().index(end) + 1  # no step after the last row has ended
    assert greedily(model, params, config, tokens[1:2], mask[1:2], 6, end=end)[0, 5 + len(ours) :].eq(end).all()


@pytest.mark.parametrize("family", ["gpt2", *llama_witness.FAMILIES])
@settings(deadline=None, derandomize=True, max_examples=2)
@given(data=st.data(), seed=st.integers(0, 99), lengths=st.lists(st.integers(1, 7), min_size=3, max_size=3))
def test_greedy_rows_equal_transformers_token_for_token(
    family: str, data: st.DataObject, seed: int, lengths: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    steps = 12 if family != "gpt2" else 5
    if family == "gpt2":
        model, params, config = gpt2, GPT2, CONFIG
        theirs = gpt2_witness.their_model(params, config)
    else:
        fields = data.draw(llama_witness.fields_of(family)) | {"vocab_size": 17}
        if fields["rope_parameters"]["rope_type"] == "dynamic":  # theirs is of the longest row
            fields["rope_parameters"] = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}
        if fields.get("sliding_window") == 1:  # of which their cache keeps everything
            fields["sliding_window"] = 2
        theirs = llama_witness.their_model(family, fields, seed)
        folder = tmp_path_factory.mktemp("model")
        theirs.save_pretrained(folder)
        model, (params, config) = llama, llama.from_hf(folder)
        config = dataclasses.replace(config, context=40)  # beyond the context that the rope was made for
    tokens, mask = padded(lengths, seed)
    end = data.draw(st.integers(0, 16))
    found = greedily(model, params, config, tokens, mask, steps, end=end, padding=0)
    wanted = theirs.generate(
        tokens, attention_mask=mask.long(), max_new_tokens=steps, do_sample=False, pad_token_id=0, eos_token_id=end
    )
    wanted = torch.cat([wanted, wanted.new_zeros(3, found.shape[1] - wanted.shape[1])], 1)
    for row in range(3):
        agreed = int((found[row] == wanted[row]).long().cumprod(0).sum())
        if agreed == found.shape[1]:
            continue
        text = found[row : row + 1, :agreed][:, tokens.shape[1] - lengths[row] :]
        best = model.apply(params, text, config)[0, -1].topk(2).values
        # where two logits lie within rounding of each other either may come first, and the row says no more
        assert best[0] - best[1] <= 2e-5 * best[0].abs()


def test_a_window_of_a_few_tokens_is_generated_from_a_cache_of_a_few() -> None:
    config = dataclasses.replace(WINDOWED, window_layers=None)
    tokens = draw_tokens(2, 9)
    text = generate(llama, LLAMA, tokens, config, steps=12, temperature=0)
    for _ in range(12):
        chosen = llama.apply(LLAMA, tokens, config)[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, chosen], 1)
    assert torch.equal(text, tokens)
    assert {keys.shape[2] for keys in llama.init_cache(config, 2).keys} == {3}


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, r"shape of the prompt \(2, 4\), came \(2, 3\)"),
        ({"mask": torch.ones(2, 4)}, TypeError, "a boolean mask.* came torch.float32; pass mask.bool"),
        ({"mask": torch.tensor([[True] * 4, [True, False, True, True]])}, ValueError, "in row 1; pad on the left"),
        ({"mask": torch.zeros(2, 4, dtype=torch.bool)}, ValueError, "in row 0; pad on the left"),
        ({"end": -1}, ValueError, "expected end of at least 0, came -1"),
        ({"end": "."}, TypeError, "expected end to be an int, came str"),
        ({"end": []}, ValueError, "a token in end, came none"),
        ({"padding": 1}, ValueError, "expected end beside padding=1"),
    ],
)
def test_what_cannot_be_is_named(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        generate(gpt2, GPT2, draw_tokens(2, 4), CONFIG, steps=1, temperature=0, **options)
