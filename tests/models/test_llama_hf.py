"""The Llama family in and out of folders of transformers: the same numbers, or an error that names the field."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import llama_witness
import parity
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_witness import FAMILIES

import functrain as ft
from functrain import random, tree
from functrain.models import hf, llama

transformers.utils.logging.disable_progress_bar()


def layout_of(family: str) -> hf.Layout:
    return next(layout for layout in llama.HF if layout.model_type == family)


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, derandomize=True, max_examples=2)
@given(data=st.data(), shards=st.booleans())
def test_a_folder_of_transformers_gives_its_logits_and_gradients_and_comes_back_bit_for_bit(
    family: str, data: st.DataObject, shards: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        parity.check(data.draw(llama_witness.cases(family)), Path(folder), shards=shards)


def test_bfloat16_comes_back_bit_for_bit_and_shards_are_read(tmp_path: Path) -> None:
    config = llama.Config(
        vocab=17, context=12, layers=2, heads=2, width=8, inner=8, experts=3, expert_inner=4, qk_norm=True,
        dense_layers=(1,),
    )  # fmt: skip
    params = tree.cast(llama.init(config, random.key(0)), torch.bfloat16)
    llama.to_hf(tmp_path / "ours", params, config, end=2)
    model = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "ours")
    assert (model.dtype, model.config.eos_token_id) == (torch.bfloat16, 2)
    model.save_pretrained(tmp_path / "shards", max_shard_size=1000)
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    back, again = llama.from_hf(tmp_path / "shards")
    assert tree.allclose(back, params, rtol=0, atol=0)
    assert llama.apply(back, torch.tensor([[1, 2]]), again).dtype == torch.bfloat16


# ---- every field of their configs is computed, harmless or refused -------------------------------------------------

HARMLESS = {
    *("initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "pretraining_tp"),
    *("output_router_logits", "router_aux_loss_coef", "max_window_layers", "return_dict", "dtype", "id2label"),
    *("label2id", "problem_type", "output_hidden_states", "output_attentions", "architectures"),
    *("chunk_size_feed_forward", "transformers_version"),
}
"""Change no number that a causal language model in evaluation computes; `max_window_layers` beside `layer_types`."""

CHANGED: dict[str, Any] = {
    "vocab_size": 19, "hidden_size": 16, "intermediate_size": 10, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 6, "hidden_act": "gelu", "max_position_embeddings": 9, "rms_norm_eps": 1e-2,
    "tie_word_embeddings": True, "rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0},
    "attention_bias": True, "attention_dropout": 0.5, "mlp_bias": True, "sliding_window": 2, "use_sliding_window": True,
    "layer_types": ["sliding_attention", "full_attention"], "num_local_experts": 4, "num_experts": 4,
    "num_experts_per_tok": 1, "router_jitter_noise": 0.1, "decoder_sparse_step": 2, "moe_intermediate_size": 6,
    "norm_topk_prob": True, "mlp_only_layers": [0], "is_encoder_decoder": True,
    "per_layer_config": {"0": {"num_attention_heads": 1}},
}  # fmt: skip

SMALL: dict[str, Any] = {
    "vocab_size": 17, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 12, "pad_token_id": None, "eos_token_id": None,
    "bos_token_id": None,
}  # fmt: skip
OF_FAMILY: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 3},
    "qwen3": {"head_dim": 4, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0},
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0},
    "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 4, "use_sliding_window": True,
                  "sliding_window": 3},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_each_field_of_their_config_is_computed_harmless_or_refused(family: str) -> None:
    plain = SMALL | OF_FAMILY.get(family, {})
    kind: Any = FAMILIES[family].config_class
    table = kind(**plain).to_dict()
    ours = hf.read_config(table, layout_of(family), "config.json")
    unseen = []
    for name, value in table.items():
        if name in HARMLESS or name in ("model_type", "_name_or_path", "torch_dtype"):
            continue
        changed = CHANGED.get(name, object)
        assert changed is not object, f"{family}: a field that this test does not know: {name} = {value!r}"
        if changed == value:
            changed = 2 if name == "num_experts_per_tok" else None
        beside = {"layer_types": None} if name == "num_hidden_layers" and "layer_types" in table else {}
        try:
            other = hf.read_config(table | {name: changed} | beside, layout_of(family), "config.json")
        except ft.checkpoint.UnsupportedError as error:
            assert name in str(error) or name == "num_attention_heads", error
            continue
        if other == ours:
            unseen.append(name)
    assert unseen == []


@pytest.mark.parametrize(
    ("family", "change", "says"),
    [
        ("llama", {"hidden_act": "gelu"}, "'hidden_act': expected 'silu' or 'swish', came 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ("llama", {"rope_scaling": {"type": "yarn"}}, "'rope_scaling/factor'"),
        ("llama", {"partial_rotary_factor": 0.5}, "'partial_rotary_factor': expected 1.0"),
        ("llama", {"hidden_size": 9, "head_dim": 4}, "hidden_size: expected a multiple of the 2 heads"),
        ("llama", {"num_key_value_heads": 3}, "2 heads do not divide into 3 groups"),
        ("llama", {"add_cross_attention": True}, "'add_cross_attention': expected nothing, .*from_module"),
        ("llama", {"num_nextn_predict_layers": 1}, "'num_nextn_predict_layers': expected nothing"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "'layer_types': expected nothing"),
        ("qwen2", {"layer_types": ["full_attention"]}, "'layer_types': expected one of .* for each layer"),
        ("mixtral", {"num_experts_per_tok": 4}, "experts_per_token of at most the 3 experts, came 4"),
        ("mixtral", {"router_jitter_noise": 0.1}, "'router_jitter_noise': expected nothing, came 0.1"),
        ("qwen3_moe", {"mlp_only_layers": [0.5]}, "'mlp_only_layers': expected a list of numbers"),
    ],
)
def test_what_is_not_computed_is_refused_by_its_field(family: str, change: dict[str, Any], says: str) -> None:
    table = {"model_type": family} | SMALL | OF_FAMILY.get(family, {}) | change
    with pytest.raises(ft.checkpoint.UnsupportedError, match=says):
        hf.read_config(table, layout_of(family), "config.json")


@pytest.mark.parametrize("other", ["gemma", "gemma3_text", "deepseek_v3", "gpt_oss", "phi3", "gpt2"])
def test_another_family_is_refused_by_name(other: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "{other}"}}')
    with pytest.raises(ft.checkpoint.UnsupportedError, match=f"'llama' or 'mistral' .*came '{other}'; .*from_module"):
        llama.from_hf(tmp_path)


def test_a_config_that_none_of_transformers_computes_is_told_with_their_reasons(tmp_path: Path) -> None:
    config = llama.Config(vocab=9, context=8, layers=1, heads=2, width=8, inner=8, out_bias=True)
    with pytest.raises(ft.checkpoint.UnsupportedError, match="(?s)one of LlamaForCausalLM.*Mistral.*out_bias=False"):
        llama.to_hf(tmp_path / "ours", llama.init(config, random.key(0)), config)
    assert list(tmp_path.iterdir()) == []
