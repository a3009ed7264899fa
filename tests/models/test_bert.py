"""Laws of functrain.models.bert: the numbers of transformers, its folders, its heads, and what cannot be."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import bert_witness
import parity
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from functrain import checkpoint, random, tree
from functrain.models import bert, hf

transformers.utils.logging.disable_progress_bar()
CONFIG = bert.Config(vocab=11, context=8, layers=2, heads=2, width=4, inner=6, num_labels=3)
KEY = random.key(0)
TOKENS = random.randint(random.key(1), (2, 7), 1, 11)


@settings(deadline=None, derandomize=True, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(case=bert_witness.cases(), shards=st.booleans())
def test_a_folder_of_transformers_has_its_results_and_gradients_and_comes_back(case: parity.Case, shards: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        parity.check(case, Path(folder), shards=shards)


def test_the_published_sizes_have_their_number_of_parameters_without_their_memory() -> None:
    meta = torch.zeros(2, dtype=torch.int32, device="meta")
    base = dict(vocab=30522, context=512, layers=12, heads=12, width=768, inner=3072)
    assert tree.size(bert.init(bert.Config(**base, head="pooled"), meta)) == 109_482_240
    large = dict(vocab=30522, context=512, layers=24, heads=16, width=1024, inner=4096)
    params = bert.init(bert.Config(**large, head="pretraining"), meta)
    assert tree.size(params) == 336_226_108 and all(leaf.is_meta for leaf in tree.leaves(params))


def test_fields_that_a_config_leaves_out_are_those_of_transformers() -> None:
    theirs = json.loads(transformers.BertConfig(architectures=["BertForMaskedLM"]).to_json_string(use_diff=False))
    least = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    assert hf.read_config(least, bert.HF, "config.json") == hf.read_config(theirs, bert.HF, "config.json")


# ---- each field of transformers' config ---------------------------------------------------------------------------

OTHER_VALUES: dict[str, Any] = {
    "vocab_size": 12, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 7,
    "hidden_act": "relu", "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3,
    "max_position_embeddings": 9, "type_vocab_size": 3, "initializer_range": 0.5, "layer_norm_eps": 0.1,
    "pad_token_id": 1, "use_cache": False, "classifier_dropout": 0.3, "is_decoder": True, "add_cross_attention": True,
    "bos_token_id": 1, "eos_token_id": 1, "tie_word_embeddings": False, "architectures": ["BertForMaskedLM"],
    "output_hidden_states": True, "return_dict": False, "dtype": "bfloat16", "chunk_size_feed_forward": 1,
    "is_encoder_decoder": True, "id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1},
    "problem_type": "regression", "transformers_version": "4", "per_layer_config": {"0": {"hidden_act": "relu"}},
    "tie_last_hidden_states": True,
}  # fmt: skip
HARMLESS = {
    *("initializer_range", "use_cache", "bos_token_id", "eos_token_id", "output_hidden_states", "return_dict", "dtype"),
    *("chunk_size_feed_forward", "label2id", "problem_type", "transformers_version", "tie_last_hidden_states"),
}
REFUSED = {"is_decoder", "add_cross_attention", "tie_word_embeddings", "is_encoder_decoder", "per_layer_config"}


def test_each_field_of_the_config_of_transformers_is_computed_harmless_or_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = transformers.BertConfig(vocab_size=11, hidden_size=4, num_attention_heads=2, num_hidden_layers=2)
    config.architectures = ["BertForPreTraining"]
    plain = json.loads(config.to_json_string(use_diff=False))
    fields = set(plain) | {field.name for field in dataclasses.fields(transformers.BertConfig)}
    fields -= {"model_type", "_name_or_path", "output_attentions"}
    assert fields | {"per_layer_config", "tie_last_hidden_states"} == OTHER_VALUES.keys()
    ours = hf.read_config(plain, bert.HF, "config.json")
    for name, value in OTHER_VALUES.items():
        assert plain.get(name) != value, name
        table = plain | {name: value}
        if name in REFUSED:
            with pytest.raises(checkpoint.UnsupportedError, match=f"'{name}': expected"):
                hf.read_config(table, bert.HF, "config.json")
        else:
            found = hf.read_config(table, bert.HF, "config.json")
            assert (found == ours) == (name in HARMLESS), name
    assert caplog.records == []


# ---- heads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["pretraining", "masked_lm", "sequence", "token", "pooled", "none"])
def test_each_head_has_its_shape_and_the_labels_their_names(tmp_path: Path, head: bert.Head) -> None:
    config = dataclasses.replace(CONFIG, head=head, labels=("no", "yes", "perhaps"))
    params = bert.init(config, KEY)
    found = tree.map(lambda x: tuple(x.shape), bert.apply(params, TOKENS, config))
    wanted = {
        "pretraining": ((2, 7, 11), (2, 2)), "masked_lm": (2, 7, 11), "sequence": (2, 3), "token": (2, 7, 3),
        "pooled": (2, 4), "none": (2, 7, 4),
    }  # fmt: skip
    assert (tuple(found) if head == "pretraining" else found) == wanted[head]
    folder = bert.to_hf(tmp_path / "model", params, config)
    loaded = transformers.AutoConfig.from_pretrained(folder)
    assert loaded.id2label == {0: "no", 1: "yes", 2: "perhaps"} and loaded.label2id["perhaps"] == 2
    assert bert.from_hf(folder, head=head)[1] == config


def test_a_head_is_begun_anew_on_the_parameters_of_a_folder(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, head="masked_lm")
    folder = bert.to_hf(tmp_path / "model", bert.init(config, KEY), config)
    with pytest.raises(
        checkpoint.UnsupportedError, match="expected classifier, pooler of head 'sequence', as BertForSeq"
    ):
        bert.from_hf(folder, head="sequence")
    params, config = bert.from_hf(folder, head="none")
    config = dataclasses.replace(config, head="sequence", num_labels=3)
    whole = {**bert.init(config, random.key(5)), **params}
    assert tree.structure(whole) == tree.structure(bert.init(config, KEY))
    assert torch.equal(whole["blocks"][0]["mlp"]["up"]["weight"], params["blocks"][0]["mlp"]["up"]["weight"])
    with pytest.raises(ValueError, match="expected a head of 'pretraining', .*'none', came 'span'"):
        bert.from_hf(folder, head="span")  # type: ignore[arg-type]


def test_files_of_years_ago_are_read(tmp_path: Path) -> None:
    params = bert.init(CONFIG, KEY)
    folder = bert.to_hf(tmp_path / "model", params, CONFIG)
    state = load_file(folder / "model.safetensors")
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in state.items()
    }
    older |= {"bert.embeddings.position_ids": torch.arange(8)[None]}
    older |= {"cls.predictions.decoder.weight": state["bert.embeddings.word_embeddings.weight"].clone()}
    older |= {"cls.predictions.decoder.bias": state["cls.predictions.bias"].clone()}
    save_file(older, folder / "model.safetensors")
    assert tree.allclose(bert.from_hf(folder)[0], params, rtol=0, atol=0)
    assert "next_sentence" not in bert.from_hf(folder, head="masked_lm")[0]
    save_file(older | {"cls.predictions.decoder.bias": torch.ones(11)}, folder / "model.safetensors")
    with pytest.raises(
        checkpoint.UnsupportedError, match="'cls.predictions.decoder.bias': expected the same values as"
    ):
        bert.from_hf(folder)


# ---- computation --------------------------------------------------------------------------------------------------


def test_padding_changes_nothing_that_a_real_token_sees() -> None:
    params = tree.map(lambda x: x + 0.1, bert.init(CONFIG, KEY))
    mask = torch.arange(7)[None] < torch.tensor([[7], [4]])
    config = dataclasses.replace(CONFIG, head="none")
    padded = bert.apply(params, torch.where(mask, TOKENS, 0), config, mask=mask)
    other = bert.apply(params, torch.where(mask, TOKENS, 9), config, mask=mask)
    assert torch.equal(padded[mask], other[mask])
    # float32 rounding of values of order 1, of rows of another length
    torch.testing.assert_close(padded[1, :4], bert.apply(params, TOKENS[1:, :4], config)[0], rtol=1e-5, atol=1e-5)


def test_the_padding_token_begins_at_zero_and_is_not_trained_where_it_is_read() -> None:
    config = dataclasses.replace(CONFIG, head="none", padding=3)
    params = bert.init(config, KEY)
    assert torch.equal(params["embeddings"]["tokens"][3], torch.zeros(4))
    tokens = torch.where(TOKENS == 5, 3, TOKENS)
    grads = torch.func.grad(lambda p: bert.apply(p, tokens, config).square().sum())(params)["embeddings"]["tokens"]
    assert (tokens == 3).any() and torch.equal(grads[3], torch.zeros(4))
    assert (grads[tokens[tokens != 3].unique()].abs().sum(-1) > 0).all()


@pytest.mark.parametrize(
    ("head", "rates", "drawn"),
    [
        ("masked_lm", {"dropout": 0.3}, 5),
        ("masked_lm", {"attention_dropout": 0.3, "attention": "math"}, 2),
        ("sequence", {"classifier_dropout": 0.3}, 1),
        ("token", {"dropout": 0.3}, 6),
    ],
)
def test_dropout_is_a_function_of_the_key_and_no_two_share_a_mask(
    monkeypatch: pytest.MonkeyPatch, head: bert.Head, rates: dict[str, Any], drawn: int
) -> None:
    seen: list[tuple[int, ...]] = []
    draw = random.bits
    config = dataclasses.replace(CONFIG, head=head, **rates)
    params = bert.init(config, KEY)
    monkeypatch.setattr(random, "bits", lambda key, shape: seen.append(tuple(key.tolist())) or draw(key, shape))
    dropped = bert.apply(params, TOKENS, config, key=random.key(1))
    assert len(seen) == len(set(seen)) == drawn
    assert torch.equal(dropped, bert.apply(params, TOKENS, config, key=random.key(1)))
    assert not torch.allclose(dropped, bert.apply(params, TOKENS, config, key=random.key(2)))
    assert not torch.allclose(dropped, bert.apply(params, TOKENS, config))


def test_an_example_alone_has_the_gradient_of_its_lane() -> None:
    config = dataclasses.replace(CONFIG, head="masked_lm")
    params = tree.map(lambda x: x + 0.1, bert.init(config, KEY))
    mask = torch.arange(7)[None] < torch.tensor([[7], [4]])

    def loss(params: tree.Params, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return bert.apply(params, tokens[None], config, mask=mask[None]).square().sum()

    lanes = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, TOKENS, mask)
    alone = [torch.func.grad(loss)(params, *row) for row in zip(TOKENS, mask, strict=True)]
    # float32 rounding of gradients of order 10
    assert tree.allclose(lanes, tree.map(lambda *g: torch.stack(g), *alone), rtol=1e-4, atol=1e-4)


def test_compiled_equals_eager() -> None:
    config = dataclasses.replace(CONFIG, layers=1)
    params, mask = bert.init(config, KEY), torch.arange(7)[None] < torch.tensor([[7], [4]])
    torch._dynamo.reset()
    compiled = torch.compile(lambda p, t, m: bert.apply(p, t, config, mask=m), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for a, b in zip(compiled(params, TOKENS, mask), bert.apply(params, TOKENS, config, mask=mask), strict=True):
            torch.testing.assert_close(a, b)  # the same float32 operations, traced


# ---- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "width 4 does not divide into 3 heads; choose a width that is a multiple of 3"),
        ({"inner": 0}, "inner of at least 1, came 0"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\), came 1.0"),
        ({"classifier_dropout": -0.1}, r"classifier_dropout in \[0, 1\), came -0.1"),
        ({"padding": 11}, r"padding in \[0, 11\) or None, came 11"),
        ({"head": "span"}, "head of 'pretraining', .*, came 'span'"),
        ({"activation": "elu"}, "activation of 'gelu', .*, came 'elu'"),
        ({"labels": ("a",)}, r"expected 3 labels, as num_labels says, came \('a',\)"),
        ({"attention_dropout": 0.1}, "choose attention='math' or attention_dropout=0.0"),
    ],
)
def test_a_config_that_cannot_be_says_why(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"tokens": torch.ones(2, 9, dtype=torch.int64)}, ValueError, r"T from 1 to the context 8, came \(2, 9\); cut"),
        ({"tokens": TOKENS[0]}, ValueError, r"tokens \(B, T\).*came \(7,\)"),
        ({"tokens": TOKENS.float()}, TypeError, "int64 or int32 tokens, came torch.float32; pass tokens.long()"),
        ({"tokens": TOKENS + 11}, IndexError, r"expected tokens in \[0, 11\), the rows of the table, came"),
        ({"types": TOKENS[:, :6]}, ValueError, r"expected types \(2, 7\) as the tokens, came \(2, 6\)"),
        ({"types": TOKENS.float()}, TypeError, "int64 or int32 types"),
        ({"types": TOKENS.clamp(max=2)}, IndexError, r"in \[0, 2\), the rows of the table, came 2"),
        ({"mask": torch.ones(2, 6, dtype=torch.bool)}, ValueError, r"expected mask \(2, 7\) as the tokens"),
        (
            {"mask": torch.ones(2, 7)},
            TypeError,
            "expected a boolean mask, true at tokens, came torch.float32; pass mask",
        ),
    ],
)
def test_inputs_that_cannot_be_are_named(inputs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bert.apply(bert.init(CONFIG, KEY), **{"tokens": TOKENS, **inputs}, config=CONFIG)


def test_a_config_that_disagrees_with_its_tensors_is_told(tmp_path: Path) -> None:
    folder = bert.to_hf(tmp_path / "model", bert.init(CONFIG, KEY), CONFIG)
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(table | {"intermediate_size": 9}))
    with pytest.raises(checkpoint.MismatchError, match=r"intermediate.dense.bias' \(blocks/0/mlp/up/bias here\)"):
        bert.from_hf(folder)
