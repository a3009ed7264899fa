"""What a layout says as data: fields that follow from others, lists, rotary positions, labels, heads, many as one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from functrain import checkpoint, random, tree
from functrain.models import hf, names, shared_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A model with most of what config files can say, and no computation."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    layer_types: tuple[str, ...]
    image: int | tuple[int, ...]
    activation: str
    tied: bool
    rope: Any
    num_labels: int
    labels: tuple[str, ...] | None
    head: str


def init(config: Config, key: Tensor) -> tree.Params:
    def of(*shape: int) -> Tensor:
        return torch.zeros(shape, device=key.device)

    width, kv = config.width, config.kv_heads * config.head_dim
    block = {
        "qkv": {"weight": of(width, config.heads * config.head_dim + 2 * kv), "bias": of(width + 2 * kv)},
        "experts": {"up": of(3, width, 5), "both": of(3, width, 4)},
        "norm": {"weight": of(width)},
    }
    params: tree.Params = {"embed": of(7, width), "blocks": [block] * config.layers}
    if config.head != "none" and not config.tied:
        params["lm_head"] = of(width, 7)
    if config.head == "labels":
        params["classifier"] = {"weight": of(width, config.num_labels)}
    return params


def layout_names(config: Config) -> names.Names:
    heads = config.head != "none" and not config.tied
    classes = config.head == "labels"
    return names.Names(
        modules={
            "embed": "model.embed.weight",
            "lm_head": "lm_head.weight",
            "classifier": "score",
            "blocks/*/experts/up": "model.layers.*.experts.#.w1.weight",
            "blocks/*/norm": "model.layers.*.norm",
        },
        joined={
            "blocks/*/qkv": {
                "model.layers.*.q": config.heads, "model.layers.*.k": config.kv_heads,
                "model.layers.*.v": config.kv_heads,
            },
            "blocks/*/experts/both": {
                "model.layers.*.experts.#.w2.weight": 1, "model.layers.*.experts.#.w3.weight": 1,
            },
        },
        transposed=["blocks/*/qkv/weight", "blocks/*/experts/*", *["lm_head"] * heads, *["classifier/*"] * classes],
    )  # fmt: skip


LAYOUT = hf.Layout(
    model_type="toy",
    architecture={"lm": "ToyForLM", "labels": "ToyForLabels", "none": "ToyModel"},
    prefix="model.",
    names=layout_names,
    tied=lambda config: {"lm_head.weight": "embed"} if config.tied else {},
    ignored=("position_ids",),
    older={"norm.gamma": "norm.weight"},
    heads=("lm_head.weight", "score.**"),
    fields={
        "layers": hf.Field("num_layers", 2),
        "width": hf.Field("hidden_size", 4),
        "heads": hf.Field("num_heads", 2),
        "kv_heads": hf.Field("num_kv_heads", 1, null=lambda ours: ours["heads"]),
        "head_dim": hf.Field("head_dim", None, kind=int, null=lambda ours: ours["width"] // ours["heads"]),
        "window": hf.Field("sliding_window", 4096, null=lambda ours: None),
        "layer_types": hf.Field(
            "layer_types", None, kind=list[str], null=lambda ours: ("full",) * ours["layers"], choices=("full", "local")
        ),
        "image": hf.Field("image_size", 8, kind=int | list[int], older=("img_size",)),
        "activation": hf.Field("act", "gelu", choices=("gelu", "relu")),
        "tied": hf.Field("tie_word_embeddings", False),
    },
    groups=(
        shared_fields.rotary(theta=1e4, read=lambda found: tuple(sorted(found.items())), write=dict),
        shared_fields.class_labels(),
    ),
    config=Config,
    init=init,
    fixed=lambda config: {"bias": (False,)},
    silent=("max_position_embeddings",),
)


def config_of(head: str | None = None, **fields: Any) -> Config:
    return hf.read_config({"model_type": "toy", "architectures": ["ToyForLM"], **fields}, LAYOUT, "config.json", head)


def shaken(config: Config) -> tree.Params:
    shapes = init(config, random.key(0))
    leaves = [random.normal(random.fold_in(random.key(1), i), x.shape) for i, x in enumerate(tree.leaves(shapes))]
    return tree.unflatten(tree.structure(shapes), leaves)


def test_a_field_that_is_null_follows_from_others_and_one_that_is_absent_has_its_default() -> None:
    absent = config_of()
    assert (absent.kv_heads, absent.head_dim, absent.window, absent.layer_types) == (1, 2, 4096, ("full", "full"))
    null = config_of(num_kv_heads=None, head_dim=None, sliding_window=None, layer_types=None)
    assert (null.kv_heads, null.head_dim, null.window, null.layer_types) == (2, 2, None, ("full", "full"))
    given = config_of(num_kv_heads=2, head_dim=6, sliding_window=3, layer_types=["full", "local"], img_size=[4, 6])
    assert (given.kv_heads, given.head_dim, given.window) == (2, 6, 3)
    assert (given.layer_types, given.image) == (("full", "local"), (4, 6))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_heads": None}, "'num_heads': expected a number such as 2, came None; mend config.json"),
        ({"head_dim": "2"}, "'head_dim': expected a number, came '2'"),
        ({"layer_types": "full"}, r"'layer_types': expected list\[str\], came 'full'"),
        ({"layer_types": ["full", 1]}, r"'layer_types': expected list\[str\], came \['full', 1\]"),
        ({"layer_types": ["full", "odd"]}, "'layer_types': expected 'full' or 'local', came 'odd'; choose a model"),
        ({"act": "tanh"}, "'act': expected 'gelu' or 'relu', came 'tanh'; choose a model without it"),
        ({"act": 3}, "'act': expected a string such as gelu, came 3"),
        ({"tie_word_embeddings": 1}, "'tie_word_embeddings': expected true or false, came 1"),
        ({"image_size": [2**40]}, "'image_size': expected at most 268435456, came 1099511627776"),
        ({"image_size": 8, "img_size": 9}, "'img_size': expected 8 as in image_size, came 9; give them one value"),
        ({"bias": True}, "'bias': expected False, came True"),
        ({"is_encoder_decoder": True}, "'is_encoder_decoder': expected False, came True"),
        ({"per_layer_config": {"0": {"num_heads": 1}}}, "'per_layer_config': expected None or {}"),
        (
            {"architectures": ["ToyForChoice"]},
            r"expected \['ToyForLM'\] or .*; say which part to load, by head= of 'lm'",
        ),
        ({"architectures": None}, "'architectures': expected .* came None; say which part"),
        ({"num_labels": 3, "id2label": {"0": "no", "1": "yes"}}, "'num_labels': expected 2, the names in id2label"),
        ({"id2label": {"0": "no", "2": "yes"}}, "'id2label': expected a name for each class from '0' on"),
    ],
)
def test_what_is_not_computed_is_refused_by_its_field(change: dict[str, Any], says: str) -> None:
    with pytest.raises(checkpoint.UnsupportedError, match=says) as caught:
        config_of(**change)
    assert str(caught.value).startswith("config.json")


NEWER = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("table", "values"),
    [
        ({}, {"rope_type": "default", "rope_theta": 1e4}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, {"rope_type": "default", "rope_theta": 7.0}),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_type": "linear", "rope_theta": 1e4, "factor": 2}),
        ({"rope_parameters": NEWER}, NEWER),
        ({"rope_theta": 5e5, "max_position_embeddings": 16, "rope_scaling": {"type": "yarn", "factor": 4.0}}, NEWER),
        ({"rope_parameters": NEWER | {"attention_factor": None}}, NEWER),
    ],
)
def test_rotary_positions_are_read_from_newer_and_older_fields_as_transformers_does(
    table: dict[str, Any], values: dict[str, Any]
) -> None:
    found = dict(config_of(**table).rope)
    assert found == values
    theirs = transformers.LlamaConfig(**{"max_position_embeddings": 64} | json.loads(json.dumps(table)))
    assert {key: value for key, value in theirs.rope_parameters.items() if key != "type" and value is not None} == found


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (
            {"rope_parameters": {"rope_type": "longrope"}},
            "'rope_parameters/rope_type': expected 'default' or .*longrope",
        ),
        ({"rope_scaling": {"type": "linear"}}, "'rope_scaling/factor': expected a number, as 'linear' needs one"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "'rope_scaling/factor': expected a number above 0"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "'rope_scaling/factor': expected a number above 0"),
        ({"rope_parameters": {"factor": 2}}, "'rope_parameters/factor': expected no such parameter of 'default'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "'rope_parameters/partial_rotary_factor': expected 1.0"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor': expected 1.0, came 0.5"),
        (
            {"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 6.0},
            "'rope_theta': expected 5.0 as in rope_parameters",
        ),
        ({"rope_parameters": {"rope_type": "linear", "type": "yarn", "factor": 2}}, "/type': expected 'linear' as in"),
        (
            {"rope_parameters": NEWER, "rope_scaling": {"type": "linear"}},
            "'rope_scaling': expected .* as in rope_param",
        ),
        ({"rope_theta": "many"}, "'rope_scaling/rope_theta': expected a number above 0, came 'many'"),
        ({"rope_parameters": [1]}, "'rope_parameters': expected the parameters by name"),
        ({"rope_parameters": NEWER | {"truncate": 1}}, "'rope_parameters/truncate': expected true or false, came 1"),
    ],
)
def test_rotary_positions_that_are_not_computed_are_refused(table: dict[str, Any], says: str) -> None:
    with pytest.raises(checkpoint.UnsupportedError, match=says):
        config_of(**table)


@pytest.mark.parametrize("head", ["lm", "labels", "none"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_written_is_read_again_with_all_that_it_says(tmp_path: Path, head: str, tied: bool) -> None:
    config = config_of(
        head, head_dim=2, image_size=[4, 6], sliding_window=None, rope_parameters=NEWER, tie_word_embeddings=tied,
        id2label={"0": "no", "1": "yes", "2": "perhaps"},
    )  # fmt: skip
    assert config.labels == ("no", "yes", "perhaps")
    params = shaken(config)
    hf.write(tmp_path / "model", params, config, LAYOUT, {})
    state = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(state["model.layers.1.k.bias"], params["blocks"][1]["qkv"]["bias"][4:6])
    assert torch.equal(state["model.layers.0.v.weight"], params["blocks"][0]["qkv"]["weight"][:, 6:].mT)
    assert torch.equal(state["model.layers.0.experts.2.w1.weight"], params["blocks"][0]["experts"]["up"][2].mT)
    assert torch.equal(state["model.layers.0.experts.2.w3.weight"], params["blocks"][0]["experts"]["both"][2, :, 2:].mT)
    assert ("lm_head.weight" in state, "score.weight" in state) == (head != "none" and not tied, head == "labels")
    back, again = hf.read(tmp_path / "model", LAYOUT)
    assert again == config
    assert tree.structure(back) == tree.structure(params) and tree.allclose(back, params, rtol=0, atol=0)
    assert all(leaf.is_contiguous() for leaf in tree.leaves(back))
    table = json.loads((tmp_path / "model" / "config.json").read_text())
    assert table["id2label"] == {"0": "no", "1": "yes", "2": "perhaps"} and table["label2id"]["perhaps"] == 2
    assert (table["sliding_window"], table["image_size"], table["rope_parameters"]) == (None, [4, 6], NEWER)


def test_classes_without_names_are_those_of_transformers() -> None:
    assert config_of(num_labels=3).num_labels == 3 and config_of().num_labels == 2
    theirs = transformers.BertConfig(num_labels=3).to_dict()
    named = {"id2label": {str(number): name for number, name in theirs["id2label"].items()}}
    assert (config_of(**named).num_labels, config_of(**named).labels) == (3, None)


def test_a_head_is_that_of_the_folder_or_the_one_that_is_asked_for(tmp_path: Path) -> None:
    config = config_of("labels")
    params = shaken(config)
    folder = hf.write(tmp_path / "model", params, config, LAYOUT, {})
    smaller, its_config = hf.read(folder, LAYOUT, head="lm")
    assert its_config == dataclasses.replace(config, head="lm")
    without = {name: leaf for name, leaf in params.items() if name != "classifier"}
    assert tree.structure(smaller) == tree.structure(without)
    assert tree.allclose(smaller, without, rtol=0, atol=0)
    with pytest.raises(ValueError, match="expected a head of 'lm', 'labels', 'none', came 'span'; choose one"):
        hf.read(folder, LAYOUT, head="span")


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_head_that_the_folder_lacks_is_named_with_the_way_to_begin_one(tmp_path: Path, prefix: str) -> None:
    config = config_of("none")
    folder = hf.write(tmp_path / "model", shaken(config), config, LAYOUT, {})
    state = load_file(folder / "model.safetensors")
    bare = {prefix + name.removeprefix("model."): tensor for name, tensor in state.items()}
    save_file(bare, folder / "model.safetensors")
    with pytest.raises(checkpoint.UnsupportedError) as caught:
        hf.read(folder, LAYOUT, head="labels")
    assert str(caught.value) == (
        f"{folder}: 'score.weight': expected classifier, lm_head of head 'labels', as ToyForLabels has it, "
        "came no tensor of it; load it with head='none', and begin what is missing anew: "
        "params = {**init(config, key), **params} with the config of head 'labels'"
    )
    params, config = hf.read(folder, LAYOUT)
    config = dataclasses.replace(config, head="labels")
    params = {**init(config, random.key(0)), **params}
    assert tree.structure(params) == tree.structure(init(config, random.key(0)))


def test_names_of_older_files_and_of_no_parameters_are_passed_over(tmp_path: Path) -> None:
    config = config_of()
    params = shaken(config)
    folder = hf.write(tmp_path / "model", params, config, LAYOUT, {})
    state = load_file(folder / "model.safetensors")
    older = {name.replace("norm.weight", "norm.gamma"): tensor for name, tensor in state.items()}
    assert "model.layers.0.norm.gamma" in older
    save_file(older | {"model.position_ids": torch.arange(3)}, folder / "model.safetensors")
    assert tree.allclose(hf.read(folder, LAYOUT)[0], params, rtol=0, atol=0)


def test_of_several_layouts_the_one_of_the_folder_is_taken(tmp_path: Path) -> None:
    other = dataclasses.replace(LAYOUT, model_type="other")
    config = config_of()
    folder = hf.write(tmp_path / "model", shaken(config), config, other, {})
    assert hf.read(folder, [LAYOUT, other])[1] == config
    with pytest.raises(
        checkpoint.UnsupportedError, match="'model_type': expected 'toy' or 'third', came 'other'; load"
    ):
        hf.read(folder, [LAYOUT, dataclasses.replace(LAYOUT, model_type="third")])


def test_parts_of_a_leaf_that_differ_or_are_missing_are_named(tmp_path: Path) -> None:
    config = config_of()
    folder = hf.write(tmp_path / "model", shaken(config), config, LAYOUT, {})
    state = load_file(folder / "model.safetensors")
    half = state | {"model.layers.0.k.bias": state["model.layers.0.k.bias"].half()}
    save_file(half, folder / "model.safetensors")
    with pytest.raises(
        checkpoint.MismatchError, match="'model.layers.0.k.bias': expected torch.float32 as of .*q.bias"
    ):
        hf.read(folder, LAYOUT)
    fewer = {name: tensor for name, tensor in state.items() if ".experts.1.w2." not in name}
    fewer["model.layers.0.k.weight"] = torch.zeros(3, 4)
    save_file(fewer, folder / "model.safetensors")
    with pytest.raises(checkpoint.MismatchError) as caught:
        hf.read(folder, LAYOUT)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith(f"{folder}: expected the names and shapes of the model, came 3 differences")
    assert lines[0].startswith("  missing (2): 'model.layers.0.experts.1.w2.weight'")
    assert lines[1] == "  shape of 'model.layers.0.k.weight' (blocks/0/qkv/weight here): expected (2, 4), came (3, 4)"


def test_a_leaf_of_more_tensors_than_there_are_is_refused_before_their_names_are_made() -> None:
    like = {"experts": torch.empty(1 << 40, 2, 3, device="meta")}
    with pytest.raises(checkpoint.MismatchError, match=r"missing \(1099511627776\): 'up.#.weight' from 0 on"):
        names.from_state_dict({}, like=like, names=names.Names(modules={"experts": "up.#.weight"}))


def test_a_dimension_that_the_shares_do_not_divide_is_refused() -> None:
    joined = names.Names(joined={"kv": {"k": 1, "v": 1}})
    with pytest.raises(ValueError, match=r"kv: expected a last dimension that divides into 2 parts, .*came \(3,\)"):
        names.to_state_dict({"kv": torch.zeros(3)}, joined)
