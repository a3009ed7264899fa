"""What no model of functrain computes is refused, and the error says that transformers' module can be trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from functrain import checkpoint, random
from functrain.models import bert, gpt2, hf, llama, modernbert, vit

MODELS = [bert, gpt2, llama, modernbert, vit]
OTHERS = ["gemma3_text", "deepseek_v3", "gpt_oss", "phi3", "t5", "modernbert-decoder", None]
WAY_OUT = "load it in transformers and take ft.from_module of that"


@pytest.mark.parametrize("model", MODELS, ids=[model.__name__.rpartition(".")[2] for model in MODELS])
def test_each_model_names_the_way_out_for_a_family_that_it_is_not(tmp_path: Path, model: Any) -> None:
    for other in OTHERS:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": other}))
        with pytest.raises(checkpoint.UnsupportedError, match=f"'model_type': expected '.*came {other!r}; .*{WAY_OUT}"):
            model.from_hf(tmp_path)


@pytest.mark.parametrize(
    ("model", "change"),
    [
        (llama, {"rope_parameters": {"rope_type": "longrope"}}),
        (llama, {"rope_parameters": {"partial_rotary_factor": 0.5}}),
        (llama, {"rope_parameters": {"mrope_section": [1, 2]}}),
        (llama, {"partial_rotary_factor": 0.5}),
        (llama, {"hidden_act": "gelu_pytorch_tanh"}),
        (llama, {"add_cross_attention": True}),
        (llama, {"num_nextn_predict_layers": 1}),
        (llama, {"kv_lora_rank": 512}),
        (llama, {"layer_types": ["chunked_attention"] * 32}),
        (gpt2, {"add_cross_attention": True}),
        (gpt2, {"activation_function": "relu"}),
        (bert, {"position_embedding_type": "relative_key"}),
        (bert, {"is_decoder": True}),
        (modernbert, {"hidden_activation": "elu"}),
        (modernbert, {"add_cross_attention": True}),
        (vit, {"hidden_act": "elu"}),
        *[(model, {"per_layer_config": {"0": {}}}) for model in MODELS],
        *[(model, {"architectures": ["ForQuestionAnswering"]}) for model in (bert, modernbert, vit)],
    ],
)
def test_a_field_that_a_model_does_not_compute_names_the_way_out(model: Any, change: dict[str, Any]) -> None:
    layout = model.HF[0] if isinstance(model.HF, list) else model.HF
    named = layout.architecture if isinstance(layout.architecture, str) else layout.architecture["none"]
    table = {"model_type": layout.model_type, "architectures": [named], **change}
    with pytest.raises(checkpoint.UnsupportedError, match=f"'.*': expected .*{WAY_OUT}"):
        hf.read_config(table, layout, "config.json")


def test_the_class_of_another_head_is_named_where_its_tensors_do_not_fit(tmp_path: Path) -> None:
    config = gpt2.Config(vocab=9, context=4, layers=1, heads=1, width=4)
    folder = gpt2.to_hf(tmp_path / "model", gpt2.init(config, random.key(0)), config)
    table = json.loads((folder / "config.json").read_text()) | {"architectures": ["GPT2ForSequenceClassification"]}
    (folder / "config.json").write_text(json.dumps(table))
    gpt2.from_hf(folder)  # whose tensors are those of a language model
    state = load_file(folder / "model.safetensors")
    save_file(state | {"score.weight": state["transformer.wte.weight"].clone()}, folder / "model.safetensors")
    with pytest.raises(
        checkpoint.UnsupportedError, match=f"'architectures': expected .*'GPT2LMHead.*{WAY_OUT}"
    ) as caught:
        gpt2.from_hf(folder)
    assert "score.weight" in str(caught.value.__cause__)
