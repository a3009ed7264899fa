"""ModernBERT in and out of folders of transformers: the same numbers, or an error that names the field."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import modernbert_witness
import parity
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from functrain import checkpoint, tree
from functrain.models import hf, modernbert

transformers.utils.logging.disable_progress_bar()


@settings(deadline=None, derandomize=True, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(case=modernbert_witness.cases(), shards=st.booleans())
def test_a_folder_of_transformers_has_its_results_and_gradients_and_comes_back(case: parity.Case, shards: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        parity.check(case, Path(folder), shards=shards)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_training_is_that_of_transformers_with_torch_adamw(accumulate: int) -> None:
    ours, theirs = modernbert_witness.trained(6, accumulate)
    assert theirs[-1] < theirs[0]
    # float32 sums of some thousand terms in another order
    assert all(abs(a - b) <= 1e-5 * b for a, b in zip(ours, theirs, strict=True))


def test_the_published_sizes_have_their_number_of_parameters_without_their_memory() -> None:
    meta = torch.zeros(2, dtype=torch.int32, device="meta")
    base = dict(vocab=50368, context=8192, layers=22, heads=12, width=768, inner=1152)
    large = dict(vocab=50368, context=8192, layers=28, heads=16, width=1024, inner=2624)
    for fields in (base, large):
        params = modernbert.init(modernbert.Config(**fields), meta)
        names = {"vocab": "vocab_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
        names |= {"width": "hidden_size", "inner": "intermediate_size", "context": "max_position_embeddings"}
        with torch.device("meta"):
            model = transformers.ModernBertForMaskedLM(
                transformers.ModernBertConfig(**{names[name]: value for name, value in fields.items()})
            )
        assert tree.size(params) == sum(leaf.numel() for leaf in model.parameters())
        assert all(leaf.is_meta for leaf in tree.leaves(params))


def test_fields_that_a_config_leaves_out_are_those_of_transformers() -> None:
    config = transformers.ModernBertConfig(architectures=["ModernBertForMaskedLM"])
    theirs = json.loads(config.to_json_string(use_diff=False))
    least = {"model_type": "modernbert", "architectures": ["ModernBertForMaskedLM"]}
    ours = hf.read_config(least, modernbert.HF, "config.json")
    assert ours == hf.read_config(theirs, modernbert.HF, "config.json")
    assert ours.which_global == dataclasses.replace(ours, global_layers=None).which_global
    default = modernbert.Config(vocab=1, context=1, layers=1, heads=1, width=2, inner=1)
    assert (ours.global_rope, ours.local_rope) == (default.global_rope, default.local_rope)


# ---- each field of transformers' config ---------------------------------------------------------------------------

OTHER_VALUES: dict[str, Any] = {
    "vocab_size": 12, "hidden_size": 8, "intermediate_size": 7, "num_hidden_layers": 1, "num_attention_heads": 1,
    "hidden_activation": "relu", "max_position_embeddings": 9, "initializer_range": 0.5,
    "initializer_cutoff_factor": 3.0, "norm_eps": 0.1, "norm_bias": True, "pad_token_id": 1, "eos_token_id": 1,
    "bos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1, "attention_bias": True, "attention_dropout": 0.3,
    "layer_types": ["sliding_attention"] * 2, "local_attention": 4, "embedding_dropout": 0.3, "mlp_bias": True,
    "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 7.0}}, "mlp_dropout": 0.3,
    "decoder_bias": False, "classifier_pooling": "mean", "classifier_dropout": 0.3, "classifier_bias": True,
    "classifier_activation": "relu", "deterministic_flash_attn": True, "sparse_prediction": True,
    "sparse_pred_ignore_index": -1, "tie_word_embeddings": False, "architectures": ["ModernBertModel"],
    "output_hidden_states": True, "return_dict": False, "dtype": "bfloat16", "chunk_size_feed_forward": 1,
    "is_encoder_decoder": True, "id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1},
    "problem_type": "regression", "transformers_version": "4", "per_layer_config": {"0": {"hidden_size": 2}},
    "tie_last_hidden_states": True,
}  # fmt: skip
HARMLESS = {
    *("initializer_range", "initializer_cutoff_factor", "eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id"),
    *("deterministic_flash_attn", "sparse_prediction", "sparse_pred_ignore_index", "output_hidden_states", "dtype"),
    *("return_dict", "chunk_size_feed_forward", "label2id", "problem_type", "transformers_version"),
    "tie_last_hidden_states",
}
REFUSED = {"is_encoder_decoder", "per_layer_config"}
SMALL: dict[str, Any] = {
    "vocab_size": 11, "hidden_size": 4, "num_attention_heads": 2, "num_hidden_layers": 2, "pad_token_id": None,
    "eos_token_id": None, "bos_token_id": None, "cls_token_id": None, "sep_token_id": None,
    "architectures": ["ModernBertForMaskedLM"],
}  # fmt: skip


def test_each_field_of_the_config_of_transformers_is_computed_harmless_or_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = json.loads(transformers.ModernBertConfig(**SMALL).to_json_string(use_diff=False))
    fields = set(plain) | {field.name for field in dataclasses.fields(transformers.ModernBertConfig)}
    fields -= {"model_type", "_name_or_path", "output_attentions"}
    assert fields | {"per_layer_config", "tie_last_hidden_states"} == OTHER_VALUES.keys()
    ours = hf.read_config(plain, modernbert.HF, "config.json")
    for name, value in OTHER_VALUES.items():
        assert plain.get(name) != value, name
        table = plain | {name: value} | ({"layer_types": None} if name == "num_hidden_layers" else {})
        if name in REFUSED:
            with pytest.raises(checkpoint.UnsupportedError, match=f"'{name}': expected"):
                hf.read_config(table, modernbert.HF, "config.json")
        else:
            assert (hf.read_config(table, modernbert.HF, "config.json") == ours) == (name in HARMLESS), name
    assert caplog.records == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_activation": "elu"}, "'hidden_activation': expected 'gelu' or .*from_module"),
        ({"layer_types": ["full_attention"]}, "'layer_types': expected one of .* for each layer"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "'layer_types': expected one of full_attention or"),
        ({"global_attn_every_n_layers": 0}, "'global_attn_every_n_layers': expected a number such as 3, came 0"),
        ({"num_hidden_layers": 2**20}, "'num_hidden_layers': expected at most 65536"),
        ({"sliding_window": 9}, "'sliding_window': expected 64, which follows from local_attention, came 9"),
        ({"head_dim": 4}, "'head_dim': expected 2, which follows from hidden_size, came 4"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "'rope_parameters': expected parameters of full_attention and"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "full_attention/rope_type': .*longrope"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}, "global_rope_theta": 6.0},
            "'global_rope_theta': expected 5.0 as in rope_parameters/full_attention, came 6.0; give them one value",
        ),
        ({"local_rope_theta": "many"}, "'rope_scaling/rope_theta': expected a number above 0, came 'many'"),
        ({"rope_theta": 5.0}, "'rope_theta': expected nothing, came 5.0; say global_rope_theta and local_rope_theta"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor': expected 1.0, came 0.5; .*from_module"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}, "rope_scaling": {"type": "linear"}},
            "'rope_scaling': expected nothing beside rope_parameters",
        ),
        ({"is_decoder": True}, "'is_decoder': expected nothing, came True; load it in transformers and take ft.from"),
    ],
)
def test_what_is_not_computed_is_refused_by_its_field(change: dict[str, Any], says: str) -> None:
    with pytest.raises(checkpoint.UnsupportedError, match=says):
        hf.read_config({"model_type": "modernbert", **SMALL, **change}, modernbert.HF, "config.json")


def test_older_fields_are_read_as_transformers_reads_them(caplog: pytest.LogCaptureFixture) -> None:
    older = {
        **SMALL, "num_hidden_layers": 5, "global_attn_every_n_layers": 2,
        "global_rope_theta": 50.0, "local_rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "layer_norm_eps": 0.1, "position_embedding_type": "absolute", "gradient_checkpointing": False,
        "reference_compile": None, "repad_logits_with_grad": False,
    }  # fmt: skip
    config = hf.read_config({**older, "model_type": "modernbert"}, modernbert.HF, "config.json")
    theirs = transformers.ModernBertConfig(**json.loads(json.dumps(older)))
    newer = json.loads(theirs.to_json_string(use_diff=False))
    newer = {name: value for name, value in newer.items() if not name.endswith("rope_theta")}
    assert config == hf.read_config(newer, modernbert.HF, "config.json")
    assert (config.global_layers, config.eps, config.local_rope.factor) == ((0, 2, 4), 1e-5, 2.0)
    assert (config.global_rope.base, config.local_rope.base) == (50.0, 7.0) and caplog.records == []
