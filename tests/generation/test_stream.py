"""Tokens and text as they come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tokenizers
import torch
from gpt2_witness import CONFIG, draw_params, draw_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

import functrain as ft
from functrain import data, generation, random, tree
from functrain.generation import decode_stream, generate, stream
from functrain.models import gpt2

PARAMS = draw_params(CONFIG)
law = settings(deadline=None, derandomize=True, max_examples=10)
BPE = data.train_bpe(
    data.Corpus("x", "train", (data.Document("a", "the cat, das Kätzchen, 猫, 🐈 and the cats " * 9),), ""),
    vocab_size=300,
)


@law
@given(
    seed=st.integers(0, 10**6),
    options=st.sampled_from([{"temperature": 0}, {"top_k": 3}, {"temperature": 2.0, "top_p": 0.7}]),
)
def test_a_stream_gives_the_tokens_of_generate(seed: int, options: dict[str, Any]) -> None:
    tokens, key = draw_tokens(3, 5, seed), random.key(seed)
    whole = generate(gpt2, PARAMS, tokens, CONFIG, key, steps=14, **options)
    columns = list(stream(gpt2, PARAMS, tokens, CONFIG, key, steps=14, **options))
    assert torch.equal(torch.stack(columns, 1), whole[:, 5:]) and columns[0].dtype == tokens.dtype


class Counting:
    """GPT-2, and how often it was asked."""

    init_cache = staticmethod(gpt2.init_cache)

    def __init__(self) -> None:
        self.calls = 0

    def apply_cached(self, *args: Any) -> Any:
        self.calls += 1
        return gpt2.apply_cached(*args)


def test_what_nobody_reads_is_not_computed_and_gradients_stay_on_around_it() -> None:
    model = Counting()
    found = stream(model, PARAMS, draw_tokens(1, 2), CONFIG, steps=100, temperature=0)
    assert model.calls == 0
    for _ in range(3):
        next(found)
        assert torch.is_grad_enabled()
    assert model.calls == 3


def test_a_stream_is_refused_at_the_call_and_breaks_off_at_the_first_nan() -> None:
    with pytest.raises(ValueError, match="needs a key, came None"):
        stream(gpt2, PARAMS, draw_tokens(1, 2), CONFIG, steps=3)
    model = Counting()
    bias = PARAMS["blocks"][1]["mlp"]["up"]["bias"]
    broken = tree.set_at(PARAMS, "blocks/1/mlp/up/bias", bias * torch.nan)
    with pytest.raises(FloatingPointError, match="logits are NaN"):
        list(stream(model, broken, draw_tokens(1, 2), CONFIG, steps=9, temperature=0))
    assert model.calls == 1


def test_generate_tells_its_progress_and_is_called_as_a_function() -> None:
    seen: list[tuple[int, int | None]] = []
    ft.generate(
        gpt2,
        PARAMS,
        draw_tokens(1, 2),
        CONFIG,
        steps=3,
        temperature=0,
        progress=lambda done, of: seen.append((done, of)),
    )
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert ft.generate is generation.generate


@pytest.mark.parametrize("tokenizer", [data.Bytes(), BPE], ids=["bytes", "bpe"])
@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(st.integers(0, 255), max_size=30))
def test_the_pieces_of_any_tokens_are_their_text(tokenizer: Any, tokens: list[int]) -> None:
    assert "".join(decode_stream(tokenizer, tokens)) == tokenizer.decode(tokens)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_no_character_is_shown_in_parts(text: str) -> None:
    for tokenizer in (data.Bytes(), BPE, data.Characters(text + "a")):
        pieces = list(decode_stream(tokenizer, tokenizer.encode(text).tolist()))
        assert "".join(pieces) == text
        assert "\N{REPLACEMENT CHARACTER}" in text or "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def test_a_piece_comes_with_the_last_token_of_its_character() -> None:
    pieces = decode_stream(data.Bytes(), b"a\xe2\x82\xac\xffb")
    assert list(pieces) == ["a", "", "", "€", "", "\N{REPLACEMENT CHARACTER}b", ""]

    def asked() -> Iterator[int]:
        yield from b"ab"
        pytest.fail("a piece waits for no later token")

    found = decode_stream(data.Bytes(), asked())
    assert [next(found), next(found)] == ["a", "b"]


def test_a_tokenizer_whose_spaces_depend_on_the_token_before_keeps_them() -> None:
    words = {"▁the": 0, "▁cat": 1, "s": 2}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="s"))
    library.decoder = tokenizers.decoders.Metaspace()
    tokenizer = data.Subwords(library.to_str())
    assert list(decode_stream(tokenizer, [0, 1, 2, 0])) == ["the", " cat", "s", " the", ""]
