"""Folders of transformers in and out: the same numbers and tokens, and errors that name the file and the place."""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from gpt2_witness import CONFIG, draw_params
from hypothesis import given, settings
from hypothesis import strategies as st
from later import Later
from safetensors.torch import load_file, save_file
from torch import Tensor

from functrain import checkpoint, random, tree
from functrain.generation import generate
from functrain.models import gpt2, hf, names

transformers = Later("transformers")

transformers.utils.logging.disable_progress_bar()
PARAMS = draw_params(CONFIG)


def their_config(**changes: Any) -> transformers.GPT2Config:
    plain = {"vocab_size": 17, "n_positions": 12, "n_embd": 8, "n_layer": 2, "n_head": 2, "eos_token_id": None}
    return transformers.GPT2Config(**{**plain, "bos_token_id": None, **changes}, attn_implementation="eager")


def their_model(config: transformers.GPT2Config, seed: int) -> transformers.GPT2LMHeadModel:
    """A model whose every parameter is random, so that none can be left out or exchanged unseen."""
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for number, leaf in enumerate(model.parameters()):
            leaf.copy_(0.3 * random.normal(random.fold_in(random.key(seed), number), leaf.shape))
    return model


def bits(state: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, list[int]]]:
    words = {2: torch.int16, 4: torch.int32}
    return {name: (t.dtype, t.contiguous().view(words[t.element_size()]).tolist()) for name, t in state.items()}


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    heads, dropout = draw(st.integers(1, 3)), draw(st.sampled_from([0.0, 0.1]))
    width = heads * draw(st.integers(1, 4))
    return {
        "vocab_size": draw(st.integers(5, 40)),
        "n_positions": draw(st.integers(12, 20)),
        "n_layer": draw(st.integers(1, 3)),
        "n_head": heads,
        "n_embd": width,
        "n_inner": draw(st.sampled_from([None, 4 * width])),
        "resid_pdrop": dropout,
        "embd_pdrop": dropout,
        "attn_pdrop": draw(st.sampled_from([0.0, 0.1])),
        "layer_norm_epsilon": draw(st.sampled_from([1e-5, 1e-3])),
        "activation_function": draw(st.sampled_from(["gelu_new", "gelu_pytorch_tanh"])),
    }


@settings(deadline=None, derandomize=True, max_examples=8)
@given(fields=configurations(), seed=st.integers(0, 99), indexed=st.booleans(), bare=st.booleans())
def test_a_folder_of_transformers_gives_its_logits_and_tokens(
    fields: dict[str, Any], seed: int, indexed: bool, bare: bool
) -> None:
    model = their_model(their_config(**fields), seed)
    size = sum(leaf.nbytes for leaf in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        (model.transformer if bare else model).save_pretrained(folder, max_shard_size=size // 3 if indexed else size)
        assert (Path(folder) / "model.safetensors.index.json").exists() == indexed
        params, config = gpt2.from_hf(folder)
    assert tree.structure(params) == tree.structure(gpt2.init(config, random.key(0)))
    assert (config.dropout, config.attention_dropout) == (fields["resid_pdrop"], fields["attn_pdrop"])
    tokens = random.randint(random.key(seed), (2, 6), 0, config.vocab)
    with torch.no_grad():
        # float32 rounding of logits of order 10
        torch.testing.assert_close(gpt2.apply(params, tokens, config), model(tokens).logits, rtol=1e-5, atol=1e-5)
    mask = torch.ones_like(tokens)
    theirs = model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(generate(gpt2, params, tokens, config, steps=6, temperature=0.0), theirs)


@settings(deadline=None, derandomize=True, max_examples=8)
@given(fields=configurations(), seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_our_folder_loads_in_transformers_bit_for_bit(fields: dict[str, Any], seed: int, dtype: torch.dtype) -> None:
    config = gpt2.Config(
        vocab=fields["vocab_size"], context=fields["n_positions"], layers=fields["n_layer"], heads=fields["n_head"],
        width=fields["n_embd"], dropout=fields["resid_pdrop"], attention_dropout=fields["attn_pdrop"],
        attention="math", eps=fields["layer_norm_epsilon"],
    )  # fmt: skip
    params = tree.cast(draw_params(config, seed), dtype)
    with tempfile.TemporaryDirectory() as folder:
        gpt2.to_hf(Path(folder) / "model", params, config, end=3)
        model, report = transformers.GPT2LMHeadModel.from_pretrained(f"{folder}/model", output_loading_info=True)
        back, back_config = gpt2.from_hf(f"{folder}/model")
        model.save_pretrained(f"{folder}/again")
        again, _ = gpt2.from_hf(f"{folder}/again")
    assert not any(report.values()), report
    theirs = dict(model.named_parameters())
    assert bits(names.to_state_dict(params, gpt2.NAMES)) == bits(theirs)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert (model.config.bos_token_id, model.config.eos_token_id) == (3, 3)
    wanted = "math" if config.attention_dropout else "fused"
    assert dataclasses.replace(back_config, attention=wanted) == dataclasses.replace(config, attention=wanted)
    for tree_ in (back, again):
        assert bits(names.to_state_dict(tree_, gpt2.NAMES)) == bits(theirs)


def test_shards_are_at_most_so_long_and_have_an_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hf, "_MAX_FILE_BYTES", 2000)
    gpt2.to_hf(tmp_path / "model", PARAMS, CONFIG)
    shards = sorted(path.name for path in tmp_path.glob("model/*.safetensors"))
    assert len(shards) > 1 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(sum(t.nbytes for t in load_file(tmp_path / "model" / name).values()) <= 2000 for name in shards)
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "model")
    assert bits(dict(model.named_parameters())) == bits(names.to_state_dict(PARAMS, gpt2.NAMES))
    assert bits(tree.select(gpt2.from_hf(tmp_path / "model")[0], "**")) == bits(tree.select(PARAMS, "**"))


def test_fields_that_a_config_leaves_out_are_those_of_transformers() -> None:
    theirs = transformers.GPT2Config()
    config = hf.read_config({"model_type": "gpt2"}, gpt2.HF, "config.json")
    assert config == hf.read_config(theirs.to_diff_dict() | theirs.to_dict(), gpt2.HF, "config.json")
    assert (config.vocab, config.context, config.layers, config.width, config.heads) == (50257, 1024, 12, 768, 12)


def test_a_head_and_masks_that_are_written_out_are_the_tied_ones(tmp_path: Path) -> None:
    folder = gpt2.to_hf(tmp_path / "model", PARAMS, CONFIG)
    state = load_file(folder / "model.safetensors")
    older = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    older |= {"lm_head.weight": state["transformer.wte.weight"].clone(), "h.0.attn.bias": torch.ones(1, 1, 12, 12)}
    save_file(older, folder / "model.safetensors")
    assert bits(tree.select(gpt2.from_hf(folder)[0], "**")) == bits(tree.select(PARAMS, "**"))
    nans = {name: tensor * torch.nan for name, tensor in older.items()}  # a model that diverged is still tied
    save_file(nans, folder / "model.safetensors")
    assert gpt2.from_hf(folder)[0]["wte"].isnan().all()
    save_file(older | {"lm_head.weight": older["wte.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(checkpoint.UnsupportedError, match="'lm_head.weight': expected the same values as .*wte"):
        gpt2.from_hf(folder)


# ---- errors -------------------------------------------------------------------------------------------------------


def damaged(folder: Path, config: dict[str, Any] | None = None, drop: str = "", **tensors: Tensor) -> Path:
    gpt2.to_hf(folder, PARAMS, CONFIG)
    if config:
        table = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(table))
    state = load_file(folder / "model.safetensors")
    state = {name: tensor for name, tensor in state.items() if name != drop} | tensors
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"activation_function": "relu"}, "'activation_function': expected 'gelu_new' or .*, came 'relu'; choose"),
        ({"n_inner": 16}, "'n_inner': expected None or 32, came 16"),
        ({"scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx': expected False, came True"),
        ({"tie_word_embeddings": False}, "'tie_word_embeddings': expected True, came False"),
        ({"resid_pdrop": 0.5}, r"'embd_pdrop': expected 0.5 as in resid_pdrop, came 0.0; give them one value"),
        ({"n_layer": "2"}, "'n_layer': expected a number such as 12, came '2'"),
        ({"n_layer": True}, "'n_layer': expected a number such as 12, came True"),
        ({"n_positions": 2**62}, "'n_positions': expected at most 268435456, came 4611686018427387904"),
        ({"n_layer": 10**8}, "'layers': expected at most the 28 layers that so many tensors can be, came 100000000"),
        ({"layer_norm_epsilon": -1.0}, "expected eps in .0, 1., came -1.0"),
        ({"n_head": 3}, "expected heads that divide the width 8, came 3"),
        ({"model_type": "bert"}, "'model_type': expected 'gpt2', came 'bert'; load it with the model of ft.models"),
        ({"quantization_config": {"bits": 4}}, "'quantization_config': expected plain tensors"),
    ],
)
def test_a_config_that_is_not_computed_names_file_field_and_way_out(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(checkpoint.UnsupportedError, match=says) as caught:
        gpt2.from_hf(damaged(tmp_path / "model", change))
    assert str(tmp_path / "model" / "config.json") in str(caught.value)


def test_fields_that_nobody_knows_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gpt2.from_hf(damaged(tmp_path / "plain"))
    assert caplog.records == []
    gpt2.from_hf(damaged(tmp_path / "model", {"rope_scaling": 2.0}))
    [record] = caplog.records
    assert record.levelno == logging.WARNING and record.getMessage().endswith("are ignored: rope_scaling")


def test_missing_extra_and_misshapen_tensors_are_told_at_once(tmp_path: Path) -> None:
    wrong = {"transformer.h.1.mlp.c_fc.weights": torch.zeros(8, 32), "transformer.wpe.weight": torch.zeros(11, 8)}
    folder = damaged(tmp_path / "model", drop="transformer.h.1.mlp.c_fc.weight", **wrong)
    with pytest.raises(checkpoint.MismatchError) as caught:
        gpt2.from_hf(folder)
    assert str(caught.value).splitlines() == [
        f"{folder}: expected the names and shapes of the model, came 3 differences; "
        "use the config that belongs to these tensors, or leave out what is extra",
        "  missing (1): 'transformer.h.1.mlp.c_fc.weight' (did you mean 'transformer.h.1.mlp.c_fc.weights'?)",
        "  extra (1): 'transformer.h.1.mlp.c_fc.weights' (did you mean 'transformer.h.1.mlp.c_fc.weight'?)",
        "  shape of 'transformer.wpe.weight' (wpe here): expected (12, 8), came (11, 8)",
    ]


def test_a_config_or_tree_that_transformers_lacks_writes_nothing(tmp_path: Path) -> None:
    without = dataclasses.replace(CONFIG, bias=False)
    with pytest.raises(checkpoint.UnsupportedError, match="expected bias=True, the only one that GPT2LMHeadModel has"):
        gpt2.to_hf(tmp_path / "model", gpt2.init(without, random.key(0)), without)
    with pytest.raises(checkpoint.MismatchError, match="wpe here.*expected .11, 8., came .12, 8."):
        gpt2.to_hf(tmp_path / "model", PARAMS, dataclasses.replace(CONFIG, context=11))
    mixed = tree.set_at(PARAMS, "wte", PARAMS["wte"].half())
    with pytest.raises(checkpoint.UnsupportedError, match="'wte': expected torch.float32 as of .*, came torch.float16"):
        gpt2.to_hf(tmp_path / "model", mixed, CONFIG)
    with pytest.raises(checkpoint.UnsupportedError, match="expected a floating dtype, came torch.int32"):
        gpt2.to_hf(tmp_path / "model", tree.map(lambda leaf: leaf.int(), PARAMS), CONFIG)
    assert list(tmp_path.iterdir()) == []
    gpt2.to_hf(tmp_path / "model", PARAMS, CONFIG)
    with pytest.raises(checkpoint.ExistsError, match="choose another name"):
        gpt2.to_hf(tmp_path / "model", PARAMS, CONFIG)


# ---- the next model -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    vocab: int
    width: int
    layers: int


def bert_shapes(config: BertConfig, key: Tensor) -> tree.Params:
    def norm() -> tree.Params:
        return {"weight": key.new_ones(config.width), "bias": key.new_zeros(config.width)}

    def linear(inputs: int, outputs: int) -> tree.Params:
        return {"weight": key.new_zeros(inputs, outputs), "bias": key.new_zeros(outputs)}

    width = config.width
    block = {
        "attn": {name: linear(width, width) for name in ("q", "k", "v", "out")} | {"norm": norm()},
        "mlp": {"up": linear(width, 3 * width), "down": linear(3 * width, width), "norm": norm()},
    }
    return {"tokens": key.new_zeros(config.vocab, width), "blocks": [block] * config.layers}


BERT = hf.Layout(
    model_type="bert",
    architecture="BertModel",
    prefix="bert.",
    names=names.Names(
        modules={
            "tokens": "bert.embeddings.word_embeddings.weight",
            "blocks/*/attn/q": "bert.encoder.layer.*.attention.self.query",
            "blocks/*/attn/k": "bert.encoder.layer.*.attention.self.key",
            "blocks/*/attn/v": "bert.encoder.layer.*.attention.self.value",
            "blocks/*/attn/out": "bert.encoder.layer.*.attention.output.dense",
            "blocks/*/attn/norm": "bert.encoder.layer.*.attention.output.LayerNorm",
            "blocks/*/mlp/up": "bert.encoder.layer.*.intermediate.dense",
            "blocks/*/mlp/down": "bert.encoder.layer.*.output.dense",
            "blocks/*/mlp/norm": "bert.encoder.layer.*.output.LayerNorm",
        },
        transposed=["blocks/*/attn/?/weight", "blocks/*/attn/out/weight", "blocks/*/mlp/up/weight", "**/down/weight"],
    ),
    tied={},
    ignored=("pooler.*.weight", "pooler.*.bias", "embeddings.*_embeddings.weight", "embeddings.LayerNorm.*"),
    fields={
        "vocab": hf.Field("vocab_size", 30522),
        "width": hf.Field("hidden_size", 768),
        "layers": hf.Field("num_hidden_layers", 12),
    },
    config=BertConfig,
    init=bert_shapes,
    fixed=lambda config: {"intermediate_size": (3 * config.width,)},
)


def test_another_model_adds_a_name_map_and_nothing_else(tmp_path: Path) -> None:
    theirs = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=9, hidden_size=4, num_hidden_layers=2, num_attention_heads=1, intermediate_size=12
        )
    )
    theirs.save_pretrained(tmp_path / "bert")
    layout = dataclasses.replace(BERT, ignored=[p for p in BERT.ignored if "_embeddings" not in p] + [
        "embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight",
    ])  # fmt: skip
    params, config = hf.read(tmp_path / "bert", layout)
    state = dict(theirs.named_parameters())
    assert config == BertConfig(vocab=9, width=4, layers=2)
    for i in range(2):
        layer = theirs.encoder.layer[i]
        block = params["blocks"][i]
        assert torch.equal(block["attn"]["k"]["weight"].T, layer.attention.self.key.weight)
        assert torch.equal(block["mlp"]["up"]["weight"].T, layer.intermediate.dense.weight)
        assert torch.equal(block["mlp"]["norm"]["bias"], layer.output.LayerNorm.bias)
    assert all(leaf.is_contiguous() for leaf in tree.leaves(params))
    hf.write(tmp_path / "ours", params, config, layout, {})
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert len(ours) == len(tree.leaves(params)) == 1 + 2 * 16
    assert all(torch.equal(tensor, state[name.removeprefix("bert.")]) for name, tensor in ours.items())
