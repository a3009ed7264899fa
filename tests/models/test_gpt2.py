"""Laws of functrain.models.gpt2."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gpt2_witness import CONFIG, draw_params, draw_tokens, their_model, their_name
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap

from functrain import losses, random, tree
from functrain.models import gpt2
from functrain.tree import Params

BOTH = [CONFIG, dataclasses.replace(CONFIG, attention="math")]
PARAMS = draw_params(CONFIG)
TOKENS = draw_tokens(3, 10)


# ---- the same model as transformers' ------------------------------------------------------------------------------


@pytest.mark.parametrize("config", BOTH, ids=lambda c: c.attention)
def test_logits_and_gradients_equal_transformers(config: gpt2.Config) -> None:
    model = their_model(PARAMS, config)
    logits = model(TOKENS).logits
    # float32 rounding of logits of order 10
    torch.testing.assert_close(gpt2.apply(PARAMS, TOKENS, config), logits, rtol=1e-5, atol=1e-5)

    their_loss = losses.next_token(logits, TOKENS).total
    theirs = dict(zip(dict(model.named_parameters()), torch.autograd.grad(their_loss, model.parameters()), strict=True))
    ours = grad(lambda params: losses.next_token(gpt2.apply(params, TOKENS, config), TOKENS).total)(PARAMS)
    for path, leaf in tree.items(ours):
        torch.testing.assert_close(leaf, theirs[their_name(path)], rtol=1e-4, atol=1e-4, msg=path)


def test_the_smallest_published_model_has_its_number_of_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "normal", lambda key, shape: torch.empty(shape, device="meta"))
    config = gpt2.Config(vocab=50257, context=1024, layers=12, heads=12, width=768)
    assert tree.size(gpt2.init(config, random.key(0))) == 124_439_808


# ---- init ---------------------------------------------------------------------------------------------------------


def test_init_draws_the_published_deviations() -> None:
    config = gpt2.Config(vocab=300, context=40, layers=8, heads=2, width=64)
    params = gpt2.init(config, random.key(0))
    for path, leaf in tree.items(params):
        if path.endswith("bias"):
            assert torch.equal(leaf, torch.zeros_like(leaf)), path
        elif "ln_" in path:
            assert torch.equal(leaf, torch.ones_like(leaf)), path
        else:
            deviation = 0.02 / 4 if path.endswith(("out/weight", "down/weight")) else 0.02  # 4 = sqrt(2 * 8 layers)
            # five standard deviations of an estimated deviation, deviation / sqrt(2 n)
            assert abs(leaf.std() - deviation) < 5 * deviation / (2 * leaf.numel()) ** 0.5, path
    drawn = [leaf for path, leaf in tree.items(params) if "ln_" not in path and not path.endswith("bias")]
    signs = {tuple((leaf.flatten()[:100] > 0).tolist()) for leaf in drawn}
    assert len(signs) == len(drawn) == 2 + 4 * config.layers  # no two from one key
    assert tree.allclose(params, gpt2.init(config, random.key(0)), rtol=0, atol=0)


def test_without_bias_there_is_none() -> None:
    config = dataclasses.replace(CONFIG, bias=False)
    params = gpt2.init(config, random.key(0))
    assert not [path for path in tree.paths(params) if "bias" in path]
    with_zeros = gpt2.init(CONFIG, random.key(0))
    assert torch.equal(gpt2.apply(params, TOKENS, config), gpt2.apply(with_zeros, TOKENS, CONFIG))


# ---- apply --------------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=20)
@given(seed=st.integers(0, 10**6), cut=st.integers(1, 9), config=st.sampled_from(BOTH))
def test_later_tokens_do_not_change_earlier_logits(seed: int, cut: int, config: gpt2.Config) -> None:
    tokens = draw_tokens(2, 10, seed)
    other = torch.cat([tokens[:, :cut], (tokens[:, cut:] + 1) % CONFIG.vocab], 1)
    logits, changed = gpt2.apply(PARAMS, tokens, config), gpt2.apply(PARAMS, other, config)
    assert torch.equal(logits[:, :cut], changed[:, :cut])
    assert not torch.isclose(logits[:, cut:], changed[:, cut:]).all(-1).any()


def test_logits_are_hidden_times_the_embedding() -> None:
    hidden = gpt2.hidden(PARAMS, TOKENS, CONFIG)
    assert torch.equal(gpt2.apply(PARAMS, TOKENS, CONFIG), hidden @ PARAMS["wte"].mT)
    one = losses.next_token(gpt2.apply(PARAMS, TOKENS, CONFIG), TOKENS).total
    # float32 sums of 30 losses of order 10
    torch.testing.assert_close(losses.next_token_from_hidden(hidden, PARAMS["wte"], TOKENS).total, one)


@pytest.mark.parametrize("rates", [{"dropout": 0.3}, {"attention": "math", "attention_dropout": 0.3}])
def test_dropout_is_a_function_of_the_key(rates: dict[str, object]) -> None:
    config = dataclasses.replace(CONFIG, **rates)
    whole = gpt2.apply(PARAMS, TOKENS, dataclasses.replace(config, dropout=0.0, attention_dropout=0.0))
    first, second = random.split(random.key(0)).unbind()
    dropped = gpt2.apply(PARAMS, TOKENS, config, key=first)
    assert torch.equal(gpt2.apply(PARAMS, TOKENS, config), whole)
    assert torch.equal(gpt2.apply(PARAMS, TOKENS, config, key=first), dropped)
    assert not torch.isclose(dropped, whole).all()
    assert not torch.isclose(dropped, gpt2.apply(PARAMS, TOKENS, config, key=second)).all()


def test_no_two_dropouts_share_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    draw = random.bits
    monkeypatch.setattr(random, "bits", lambda key, shape: seen.append(tuple(key.tolist())) or draw(key, shape))
    config = dataclasses.replace(CONFIG, attention="math", dropout=0.1, attention_dropout=0.1)
    gpt2.apply(PARAMS, TOKENS, config, key=random.key(0))
    assert len(set(seen)) == len(seen) == 1 + 3 * config.layers


def test_an_example_alone_equals_itself_in_a_batch_and_its_gradient_is_a_lane() -> None:
    config = dataclasses.replace(CONFIG, attention="math")

    def loss(params: Params, tokens: Tensor) -> Tensor:
        return losses.next_token_from_hidden(gpt2.hidden(params, tokens, config), params["wte"], tokens).total

    lanes = vmap(grad(loss), in_dims=(None, 0))(PARAMS, TOKENS[:, None])
    alone = [grad(loss)(PARAMS, row[None]) for row in TOKENS]
    # float32 rounding of gradients of order 10
    assert tree.allclose(lanes, tree.map(lambda *g: torch.stack(g), *alone), rtol=1e-4, atol=1e-4)
    assert tree.allclose(grad(loss)(PARAMS, TOKENS), tree.map(lambda g: g.sum(0), lanes), rtol=1e-4, atol=1e-4)


def test_parameters_in_bfloat16_give_logits_in_bfloat16() -> None:
    for config in BOTH:
        assert gpt2.apply(tree.cast(PARAMS, torch.bfloat16), TOKENS, config).dtype == torch.bfloat16


@pytest.mark.parametrize(("attention", "dropout"), [("fused", 0.0), ("math", 0.2)])
def test_compiled_equals_eager_and_no_key_compiles_anew(attention: str, dropout: float) -> None:
    # one layer: the bits of every dropout are some 120 operations to trace
    config = dataclasses.replace(CONFIG, layers=1, attention=attention, dropout=dropout)
    params = draw_params(config)
    torch._dynamo.reset()
    compiled = torch.compile(lambda p, t, k: gpt2.apply(p, t, config, key=k), fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(2):
            key = random.key(seed)
            # the same float32 operations, traced
            torch.testing.assert_close(compiled(params, TOKENS, key), gpt2.apply(params, TOKENS, config, key=key))


# ---- the cache ----------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=20)
@given(seed=st.integers(0, 10**6), pieces=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_pieces_through_the_cache_equal_the_whole(seed: int, pieces: list[int]) -> None:
    tokens = draw_tokens(2, 12, seed)[:, : sum(pieces)]
    cache, logits = gpt2.init_cache(CONFIG, 2), []
    for piece in tokens.split(pieces[: len(pieces)] if sum(pieces) <= 12 else [12], dim=1):
        before = tree.map(torch.clone, cache)
        piece_logits, after = gpt2.apply_cached(PARAMS, piece, cache, CONFIG)
        assert tree.allclose(before, cache, rtol=0, atol=0)  # the old cache is as it was
        logits.append(piece_logits)
        cache = after
    assert cache.length == tokens.shape[1]
    # float32 rounding of logits of order 10: sums over the context instead of the tokens
    torch.testing.assert_close(torch.cat(logits, 1), gpt2.apply(PARAMS, tokens, CONFIG), rtol=1e-5, atol=2e-5)


def test_a_cached_step_compiles_once_for_every_length() -> None:
    torch._dynamo.reset()
    step = torch.compile(lambda p, t, c: gpt2.apply_cached(p, t, c, CONFIG), fullgraph=True, backend="aot_eager")
    cache, compiled_cache = gpt2.init_cache(CONFIG, 3), gpt2.init_cache(CONFIG, 3)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for t in range(4):
            want, cache = gpt2.apply_cached(PARAMS, TOKENS[:, t : t + 1], cache, CONFIG)
            got, compiled_cache = step(PARAMS, TOKENS[:, t : t + 1], compiled_cache)
            torch.testing.assert_close(got, want)


# ---- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "expected heads that divide the width 8, came 3"),
        ({"layers": 0}, "layers of at least 1, came 0"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\), came 1.0"),
        ({"attention_dropout": 0.1}, "choose attention='math' or attention_dropout=0.0"),
        ({"attention": "flash"}, "attention 'fused' or 'math', came 'flash'"),
    ],
)
def test_a_config_that_cannot_be_says_why(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_tokens_that_cannot_be_are_named() -> None:
    with pytest.raises(ValueError, match=r"T from 1 to the context 12, came \(3, 13\)"):
        gpt2.apply(PARAMS, draw_tokens(3, 13), CONFIG)
    with pytest.raises(ValueError, match=r"tokens \(B, T\).*came \(10,\)"):
        gpt2.apply(PARAMS, TOKENS[0], CONFIG)
    with pytest.raises(TypeError, match="int64 or int32 tokens, came torch.float32"):
        gpt2.apply(PARAMS, TOKENS.float(), CONFIG)
    with pytest.raises(IndexError):
        gpt2.apply(PARAMS, TOKENS + CONFIG.vocab, CONFIG)
