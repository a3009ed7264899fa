"""Laws of functrain.models.modernbert: what it computes, its heads, and what cannot be."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import functrain as ft
from functrain import checkpoint, nn, random, tree
from functrain.compiler.compilation import interpret
from functrain.models import modernbert

transformers.utils.logging.disable_progress_bar()
CONFIG = modernbert.Config(vocab=19, context=18, layers=3, heads=2, width=8, inner=6, window=4, num_labels=3)
KEY = random.key(0)
TOKENS = random.randint(random.key(1), (2, 9), 1, 19)


def shaken(config: modernbert.Config) -> tree.Params:
    """Parameters whose every leaf is random."""
    params = modernbert.init(config, KEY)
    keys = random.split(random.key(5), len(tree.leaves(params)))
    noise = [0.3 * random.normal(key, leaf.shape) for key, leaf in zip(keys, tree.leaves(params), strict=True)]
    return tree.add(params, tree.unflatten(tree.structure(params), noise))


PARAMS = shaken(CONFIG)


def test_init_has_the_published_deviations_and_no_weight_beyond_two_of_them() -> None:
    config = dataclasses.replace(CONFIG, width=64, inner=64, vocab=300, layers=2, head="sequence", norm_bias=True)
    for path, leaf in tree.items(modernbert.init(config, KEY)):
        if path.endswith("bias"):
            assert not leaf.any(), path
        elif "norm" in path:
            assert torch.all(leaf == 1), path
        else:
            out = ("out/weight", "down/weight", "dense/weight")
            deviation = 64**-0.5 if "classifier" in path else 0.01 if path.endswith(out) else 0.02
            assert leaf.abs().max() <= 2 * deviation, path
            # cut at two deviations a normal has 0.88 of its deviation; five standard deviations of an estimated one
            assert abs(leaf.std() / deviation - 0.8796) < 5 / (2 * leaf.numel()) ** 0.5, path


# ---- heads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["masked_lm", "sequence", "token", "none"])
def test_each_head_has_its_shape_and_the_labels_their_names(tmp_path: Path, head: modernbert.Head) -> None:
    config = dataclasses.replace(CONFIG, head=head, labels=("no", "yes", "perhaps"))
    params = modernbert.init(config, KEY)
    wanted = {"masked_lm": (2, 9, 19), "sequence": (2, 3), "token": (2, 9, 3), "none": (2, 9, 8)}
    assert modernbert.apply(params, TOKENS, config).shape == wanted[head]
    folder = modernbert.to_hf(tmp_path / "model", params, config)
    loaded = transformers.AutoConfig.from_pretrained(folder)
    assert loaded.id2label == {0: "no", 1: "yes", 2: "perhaps"} and loaded.label2id["perhaps"] == 2
    assert modernbert.from_hf(folder, head=head)[1] == dataclasses.replace(config, global_layers=(0,))


def test_a_classifier_is_begun_on_the_head_of_masked_tokens_as_transformers_does(tmp_path: Path) -> None:
    folder = modernbert.to_hf(tmp_path / "model", PARAMS, CONFIG)
    with pytest.raises(
        checkpoint.UnsupportedError, match="expected classifier of head 'sequence', as ModernBertForSeq"
    ):
        modernbert.from_hf(folder, head="sequence")
    params, config = modernbert.from_hf(folder, head="none")
    assert "head" not in params
    config = dataclasses.replace(config, head="sequence", num_labels=3)
    whole = {**modernbert.init(config, KEY), **params, "head": modernbert.from_hf(folder)[0]["head"]}
    theirs = transformers.ModernBertForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert torch.equal(theirs.head.dense.weight, whole["head"]["dense"]["weight"].mT)
    whole["classifier"] = {"weight": theirs.classifier.weight.mT, "bias": theirs.classifier.bias}
    # float32 rounding of logits of order 1
    torch.testing.assert_close(modernbert.apply(whole, TOKENS, config), theirs.eval()(TOKENS).logits)


def test_what_the_classifier_pools_is_the_first_token_or_the_mean_of_real_ones() -> None:
    config = dataclasses.replace(CONFIG, head="sequence")
    params, mask = shaken(config), torch.arange(9) < torch.tensor([[9], [4]])
    for pooling in ("cls", "mean"):
        config = dataclasses.replace(config, pooling=pooling)
        padded = modernbert.apply(params, TOKENS, config, mask=mask)
        alone = torch.cat([modernbert.apply(params, rows, config) for rows in (TOKENS[:1], TOKENS[1:, :4])])
        torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)  # float32 rounding of logits of order 1
    assert modernbert.apply(params, TOKENS, config, mask=torch.zeros_like(mask)).isfinite().all()
    with pytest.raises(ValueError, match="expected no documents with the head 'sequence', which classifies whole rows"):
        modernbert.apply(params, TOKENS, config, documents=TOKENS)


# ---- computation --------------------------------------------------------------------------------------------------


def test_a_local_layer_sees_half_a_window_to_each_side_and_a_global_one_all() -> None:
    other = torch.cat([TOKENS[:, :8], (TOKENS[:, 8:] + 1) % 19], 1)
    for global_layers, window, reached in (((), 4, 6), ((), 5, 6), ((), 1, 0), ((1,), 4, 8)):
        config = dataclasses.replace(CONFIG, head="none", global_layers=global_layers, window=window)
        found, moved = (modernbert.hidden(PARAMS, tokens, config) for tokens in (TOKENS, other))
        same = torch.isclose(found, moved, rtol=1e-5, atol=1e-5).all(-1)
        assert same.tolist() == [[place < 8 - reached for place in range(9)]] * 2, (global_layers, window)


def test_padding_changes_nothing_that_a_real_token_sees() -> None:
    mask = torch.tensor([[False] * 3 + [True] * 6, [True] * 5 + [False] * 4])
    padded = modernbert.apply(PARAMS, TOKENS, CONFIG, mask=mask)
    assert padded.isfinite().all()
    for row, kept in enumerate(mask):
        alone = modernbert.apply(PARAMS, TOKENS[row : row + 1, kept], CONFIG)[0]
        torch.testing.assert_close(padded[row, kept], alone, rtol=1e-5, atol=1e-5)  # float32 rounding of order 1


def packed(params: Any, tokens: Any, documents: Any, positions: Any) -> torch.Tensor:
    return modernbert.apply(params, tokens, CONFIG, mask=documents >= 0, documents=documents, positions=positions)


def by_rows(params: Any, tokens: Any, documents: Any, positions: Any) -> torch.Tensor:
    rows = ft.vmap(lambda *row: packed(params, *[x[None] for x in row])[0])
    return rows(tokens, documents, positions)


WAYS = {"plain": packed, "mapped": by_rows, "its layers recomputed": ft.recompute_layers(packed)}


@pytest.mark.parametrize("way", WAYS)
def test_documents_in_a_row_do_not_see_each_other(way: str) -> None:
    lengths = (5, 2, 7, 1) if way == "plain" else (3, 4)
    ft.testing.assert_no_leak(WAYS[way], PARAMS, embedding="embeddings/tokens", lengths=lengths)


def test_positions_are_counted_anew_in_each_document() -> None:
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    counted = torch.tensor([[*range(4), *range(5)], [*range(9)]])
    assert torch.equal(
        modernbert.hidden(PARAMS, TOKENS, CONFIG, documents=documents),
        modernbert.hidden(PARAMS, TOKENS, CONFIG, documents=documents, positions=counted),
    )


def test_the_padding_token_is_not_trained_where_it_is_read() -> None:
    config = dataclasses.replace(CONFIG, head="none", padding=3)
    tokens = torch.where(TOKENS == TOKENS[0, 0], 3, TOKENS)
    grads = torch.func.grad(lambda p: modernbert.apply(p, tokens, config)[..., 0].sum())(PARAMS)["embeddings"]["tokens"]
    assert not grads[3].any() and grads[tokens[tokens != 3].unique()].any(-1).all()


@pytest.mark.parametrize(
    ("head", "rates", "drawn"),
    [
        ("masked_lm", {"embedding_dropout": 0.3}, 1),
        ("masked_lm", {"attention_dropout": 0.3, "attention": "math"}, 6),
        ("masked_lm", {"mlp_dropout": 0.3}, 3),
        ("masked_lm", {"attention_dropout": 0.3, "mlp_dropout": 0.3, "attention": "math"}, 9),
        ("sequence", {"classifier_dropout": 0.3}, 1),
        ("token", {"classifier_dropout": 0.3, "mlp_dropout": 0.3}, 4),
    ],
)
def test_dropout_is_a_function_of_the_key_and_no_two_share_a_mask(
    monkeypatch: pytest.MonkeyPatch, head: modernbert.Head, rates: dict[str, Any], drawn: int
) -> None:
    seen: list[tuple[int, ...]] = []
    draw = random.bits
    config = dataclasses.replace(CONFIG, head=head, **rates)
    params = shaken(config)
    monkeypatch.setattr(random, "bits", lambda key, shape: seen.append(tuple(key.tolist())) or draw(key, shape))
    dropped = modernbert.apply(params, TOKENS, config, key=random.key(1))
    assert len(seen) == len(set(seen)) == drawn
    assert torch.equal(dropped, modernbert.apply(params, TOKENS, config, key=random.key(1)))
    assert not torch.allclose(dropped, modernbert.apply(params, TOKENS, config, key=random.key(2)))
    assert not torch.allclose(dropped, modernbert.apply(params, TOKENS, config))


def test_lanes_of_a_map_and_both_attentions_agree() -> None:
    mask = torch.arange(9) < torch.tensor([[9], [4]])

    def loss(params: tree.Params, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return modernbert.apply(params, tokens[None], CONFIG, mask=mask[None])[0, :4].square().sum()

    lanes = ft.vmap(ft.grad(loss), in_dims=(None, 0, 0))(PARAMS, TOKENS, mask)
    alone = [ft.grad(loss)(PARAMS, *row) for row in zip(TOKENS, mask, strict=True)]
    # float32 rounding of gradients of order 10
    assert tree.allclose(lanes, tree.map(lambda *g: torch.stack(g), *alone), rtol=1e-4, atol=1e-4)
    by_formula = dataclasses.replace(CONFIG, attention="math")
    found = modernbert.apply(PARAMS, TOKENS, by_formula, mask=mask)
    torch.testing.assert_close(found, modernbert.apply(PARAMS, TOKENS, CONFIG, mask=mask), rtol=1e-5, atol=1e-5)


def test_a_gradient_that_is_traced_as_for_a_compiler_is_the_eager_one() -> None:
    config = dataclasses.replace(CONFIG, layers=2, mlp_dropout=0.3)
    params = {**PARAMS, "blocks": PARAMS["blocks"][:2]}

    def grads(params: tree.Params, tokens: torch.Tensor, key: torch.Tensor) -> tree.Params:
        return ft.grad(lambda p: modernbert.apply(p, tokens, config, key=key).square().mean())(params)

    assert tree.allclose(interpret(grads)(params, TOKENS, KEY), grads(params, TOKENS, KEY), rtol=0, atol=0)


# ---- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "width 8 does not divide into 3 heads of an even width, .*; choose a width .* multiple of 6"),
        ({"inner": 0}, "inner of at least 1, came 0"),
        ({"window": 0}, "window of at least 1, came 0"),
        ({"global_layers": (3,)}, r"global_layers in \[0, 3\), came 3"),
        ({"mlp_dropout": 1.0}, r"mlp_dropout in \[0, 1\), came 1.0"),
        ({"padding": 19}, r"padding in \[0, 19\) or None, came 19"),
        ({"head": "span"}, "head of 'masked_lm', .*, came 'span'"),
        ({"pooling": "max"}, "pooling of 'cls', 'mean', came 'max'"),
        ({"head_activation": "elu"}, "head_activation of 'gelu', .*, came 'elu'"),
        ({"labels": ("a",)}, r"expected 3 labels, as num_labels says, came \('a',\)"),
        ({"attention_dropout": 0.1}, "choose attention='math' or attention_dropout=0.0"),
        ({"global_rope": nn.Rotary(), "eps": 1.0}, r"eps in \[0, 1\), came 1.0"),
    ],
)
def test_a_config_that_cannot_be_says_why(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"tokens": torch.ones(2, 19, dtype=torch.int64)}, ValueError, r"to the context 18, came \(2, 19\); cut"),
        ({"tokens": TOKENS[0]}, ValueError, r"tokens \(B, T\).*came \(9,\)"),
        ({"tokens": TOKENS.float()}, TypeError, "int64 or int32 tokens, came torch.float32; pass tokens.long()"),
        ({"tokens": TOKENS + 19}, IndexError, r"expected tokens in \[0, 19\), the rows of the table, came"),
        ({"documents": TOKENS[:, :6]}, ValueError, r"expected documents \(2, 9\) as the tokens, came \(2, 6\)"),
        ({"positions": TOKENS.float()}, TypeError, "int64 or int32 positions"),
        ({"mask": torch.ones(2, 9)}, TypeError, "expected a boolean mask, true at tokens, came torch.float32; pass"),
    ],
)
def test_inputs_that_cannot_be_are_named(inputs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        modernbert.apply(PARAMS, **{"tokens": TOKENS, **inputs}, config=CONFIG)
