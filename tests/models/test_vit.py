"""Laws of functrain.models.vit: the numbers of transformers, its folders, its heads, and what cannot be."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import parity
import pytest
import torch
import transformers
import vit_witness
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from functrain import checkpoint, random, tree
from functrain.models import hf, vit

transformers.utils.logging.disable_progress_bar()
CONFIG = vit.Config(image=(4, 6), patch=2, channels=2, layers=2, heads=2, width=4, inner=6, num_labels=3)
KEY = random.key(0)
IMAGES = random.normal(random.key(1), (2, 2, 4, 6))


@settings(deadline=None, derandomize=True, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(case=vit_witness.cases(), shards=st.booleans())
def test_a_folder_of_transformers_has_its_results_and_gradients_and_comes_back(case: parity.Case, shards: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        parity.check(case, Path(folder), shards=shards)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_training_is_that_of_transformers_with_torch_adamw(accumulate: int) -> None:
    ours, theirs = vit_witness.trained(6, accumulate)
    # float32 sums of some thousand terms in another order
    assert all(abs(a - b) <= 1e-5 * b for a, b in zip(ours, theirs, strict=True))


def test_the_published_size_has_its_number_of_parameters_without_their_memory() -> None:
    meta = torch.zeros(2, dtype=torch.int32, device="meta")
    config = vit.Config(image=224, patch=16, layers=12, heads=12, width=768, inner=3072, num_labels=1000)
    assert tree.size(vit.init(config, meta)) == 86_567_656


def test_fields_that_a_config_leaves_out_are_those_of_transformers() -> None:
    theirs = json.loads(transformers.ViTConfig(architectures=["ViTModel"]).to_json_string(use_diff=False))
    least = {"model_type": "vit", "architectures": ["ViTModel"]}
    whole = hf.read_config(theirs, vit.HF, "config.json")
    assert (theirs["pooler_output_size"], whole.pooler_width) == (768, 768)  # they write out what follows
    assert hf.read_config(least, vit.HF, "config.json") == dataclasses.replace(whole, pooler_width=None)


OTHER_VALUES: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 6, "intermediate_size": 7, "hidden_act": "relu",
    "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3, "initializer_range": 0.5, "layer_norm_eps": 0.1,
    "image_size": 32, "patch_size": 8, "num_channels": 1, "qkv_bias": False, "encoder_stride": 8,
    "pooler_output_size": 5, "pooler_act": "relu", "architectures": ["ViTModel"], "output_hidden_states": True,
    "return_dict": False, "dtype": "bfloat16", "chunk_size_feed_forward": 1, "is_encoder_decoder": True,
    "id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1}, "problem_type": "regression",
    "transformers_version": "4", "per_layer_config": {"0": {"hidden_act": "relu"}}, "tie_last_hidden_states": True,
}  # fmt: skip
HARMLESS = {
    *("initializer_range", "encoder_stride", "output_hidden_states", "return_dict", "dtype", "chunk_size_feed_forward"),
    *("label2id", "problem_type", "transformers_version", "tie_last_hidden_states"),
}
REFUSED = {"is_encoder_decoder", "per_layer_config"}


def test_each_field_of_the_config_of_transformers_is_computed_harmless_or_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = transformers.ViTConfig(hidden_size=12, architectures=["ViTForImageClassification"])
    plain = json.loads(config.to_json_string(use_diff=False))
    fields = set(plain) | {field.name for field in dataclasses.fields(transformers.ViTConfig)}
    fields -= {"model_type", "_name_or_path", "output_attentions"}
    assert fields | {"per_layer_config", "tie_last_hidden_states"} == OTHER_VALUES.keys()
    ours = hf.read_config(plain, vit.HF, "config.json")
    for name, value in OTHER_VALUES.items():
        assert plain.get(name) != value, name
        if name in REFUSED:
            with pytest.raises(checkpoint.UnsupportedError, match=f"'{name}': expected"):
                hf.read_config(plain | {name: value}, vit.HF, "config.json")
        else:
            found = hf.read_config(plain | {name: value}, vit.HF, "config.json")
            assert (found == ours) == (name in HARMLESS), name
    assert caplog.records == []


def test_a_head_is_begun_anew_on_the_parameters_of_a_folder(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, head="pooled")
    folder = vit.to_hf(tmp_path / "model", vit.init(config, KEY), config)
    with pytest.raises(checkpoint.UnsupportedError, match="expected classifier of head 'classifier', as ViTForImage"):
        vit.from_hf(folder, head="classifier")
    params, config = vit.from_hf(folder, head="none")
    assert vit.apply(params, IMAGES, config).shape == (2, 7, 4)
    config = dataclasses.replace(config, head="classifier", num_labels=3)
    whole = {**vit.init(config, random.key(5)), **params}
    assert vit.apply(whole, IMAGES, config).shape == (2, 3)


@pytest.mark.parametrize(
    ("rates", "drawn"), [({"dropout": 0.3}, 5), ({"attention_dropout": 0.3, "attention": "math"}, 2)]
)
def test_dropout_is_a_function_of_the_key_and_no_two_share_a_mask(
    monkeypatch: pytest.MonkeyPatch, rates: dict[str, Any], drawn: int
) -> None:
    seen: list[tuple[int, ...]] = []
    draw = random.bits
    config = dataclasses.replace(CONFIG, **rates)
    params = vit.init(config, KEY)
    monkeypatch.setattr(random, "bits", lambda key, shape: seen.append(tuple(key.tolist())) or draw(key, shape))
    dropped = vit.apply(params, IMAGES, config, key=random.key(1))
    assert len(seen) == len(set(seen)) == drawn
    assert torch.equal(dropped, vit.apply(params, IMAGES, config, key=random.key(1)))
    assert not torch.allclose(dropped, vit.apply(params, IMAGES, config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "width 4 does not divide into 3 heads; choose a width that is a multiple of 3"),
        ({"patch": 3}, "an image of 4 pixels does not divide into patches of 3; choose a size"),
        ({"image": (4, 6, 8)}, r"expected image of one or two sizes from 1, came \(4, 6, 8\)"),
        ({"channels": 0}, "channels of at least 1, came 0"),
        ({"pooler_width": 0}, "pooler_width of at least 1 or None, came 0"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\), came 1.0"),
        ({"head": "span"}, "head of 'classifier', .*, came 'span'"),
        ({"activation": "elu"}, "activation of 'gelu', .*, came 'elu'"),
        ({"labels": ("a",)}, r"expected 3 labels, as num_labels says, came \('a',\)"),
        ({"attention_dropout": 0.1}, "choose attention='math' or attention_dropout=0.0"),
    ],
)
def test_a_config_that_cannot_be_says_why(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (IMAGES[0], ValueError, r"expected images \(B, 2, 4, 6\), channels first, came \(2, 4, 6\); resize or permute"),
        (IMAGES.mT, ValueError, r"came \(2, 2, 6, 4\)"),
        (IMAGES.to(torch.uint8), TypeError, "floating-point images, came torch.uint8; scale them, images / 255"),
    ],
)
def test_images_that_cannot_be_are_named(images: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        vit.apply(vit.init(CONFIG, KEY), images, CONFIG)
