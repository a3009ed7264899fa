"""How transformers keeps a ModernBERT: the names of its tensors and the fields of its config.json, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from functrain.models.activations import ACTIVATIONS
from functrain.models.layout import WITHOUT_IT, Field, Group, Layout, Refused
from functrain.models.names import Names
from functrain.models.shared_fields import absent, class_labels, of_rotary, rope_parameters, rotary_of
from functrain.nn import Rotary
from functrain.tree import Params

HEADS = {
    "masked_lm": "ModernBertForMaskedLM",
    "sequence": "ModernBertForSequenceClassification",
    "token": "ModernBertForTokenClassification",
    "none": "ModernBertModel",
}

_LAYER = "model.layers.*"
# kind of layer -> our rope, the older field of its base, and the base of a config.json that says none
_ROPES = {
    "full_attention": ("global_rope", "global_rope_theta", 160_000.0),
    "sliding_attention": ("local_rope", "local_rope_theta", 10_000.0),
}
_MOST_LAYERS = 1 << 16  # that follow from a number: a wrong one must not take all memory


def names(config: Any) -> Names:
    """Return the names of a ModernBERT's tensors in transformers; a head that the config lacks has none."""
    heads = {"masked_lm": ["head/dense/weight"], "none": []}
    return Names(
        modules={
            "embeddings/tokens": "model.embeddings.tok_embeddings.weight",
            "embeddings/norm": "model.embeddings.norm",
            "blocks/*/norm_1": f"{_LAYER}.attn_norm",
            "blocks/*/attn/qkv": f"{_LAYER}.attn.Wqkv",
            "blocks/*/attn/out": f"{_LAYER}.attn.Wo",
            "blocks/*/norm_2": f"{_LAYER}.mlp_norm",
            "blocks/*/mlp/up": f"{_LAYER}.mlp.Wi",
            "blocks/*/mlp/down": f"{_LAYER}.mlp.Wo",
            "norm": "model.final_norm",
        },
        transposed=[
            *("blocks/*/attn/*/weight", "blocks/*/mlp/*/weight"),
            *heads.get(config.head, ["head/dense/weight", "classifier/weight"]),
        ],
    )


def layout(config: Callable[..., Any], init: Callable[[Any, Tensor], Params]) -> Layout:
    """Return how transformers keeps a ModernBERT of this config, from its fields as keywords, and of these
    parameters."""
    return Layout(
        model_type="modernbert",
        architecture=HEADS,
        prefix="model.",
        names=names,
        tied=lambda config: {"decoder.weight": "embeddings/tokens"} if config.tied and _decodes(config) else {},
        ignored=(),
        heads=("head.**", "decoder.**", "classifier.**"),
        fields={
            "vocab": Field("vocab_size", 50368),
            "context": Field("max_position_embeddings", 8192),
            "layers": Field("num_hidden_layers", 22),
            "heads": Field("num_attention_heads", 12),
            "width": Field("hidden_size", 768),
            "inner": Field("intermediate_size", 1152),
            "window": Field("local_attention", 128),
            "activation": Field("hidden_activation", "gelu", choices=tuple(ACTIVATIONS)),
            "head_activation": Field("classifier_activation", "gelu", choices=tuple(ACTIVATIONS)),
            "pooling": Field("classifier_pooling", "cls", choices=("cls", "mean")),
            "tied": Field("tie_word_embeddings", True),
            "norm_bias": Field("norm_bias", False),
            "attention_bias": Field("attention_bias", False),
            "mlp_bias": Field("mlp_bias", False),
            "head_bias": Field("classifier_bias", False),
            "decoder_bias": Field("decoder_bias", True),
            "embedding_dropout": Field("embedding_dropout", 0.0),
            "attention_dropout": Field("attention_dropout", 0.0),
            "mlp_dropout": Field("mlp_dropout", 0.0),
            "classifier_dropout": Field("classifier_dropout", 0.0),
            "eps": Field("norm_eps", 1e-5),
            "padding": Field("pad_token_id", 50283, kind=int, null=lambda ours: None),
        },
        groups=(class_labels(), _layers(), _ropes(), absent("is_decoder", "add_cross_attention")),
        config=config,
        init=init,
        fixed=lambda config: {},
        silent=(
            *("cls_token_id", "sep_token_id", "initializer_cutoff_factor", "deterministic_flash_attn"),
            *("sparse_prediction", "sparse_pred_ignore_index"),  # of the loss, which is the same
            # what older files hold and nothing reads: `norm_eps` is that of all norms, and positions are rotary
            *("layer_norm_eps", "position_embedding_type", "gradient_checkpointing", "reference_compile"),
            "repad_logits_with_grad",
        ),
        ours=("attention",),
    )


def _decodes(config: Any) -> bool:
    return bool(config.head == "masked_lm")


def _layers() -> Group:
    """Which layers are global, by name or each so many, and what must agree with widths and windows."""

    def read(table: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
        layers, types, every = ours["layers"], table.get("layer_types"), table.get("global_attn_every_n_layers", 3)
        half, each = ours["window"] // 2, ours["width"] // max(ours["heads"], 1)
        for name, value, follows in (("sliding_window", half, "local_attention"), ("head_dim", each, "hidden_size")):
            if table.get(name) not in (None, value):
                expected = f"{value}, which follows from {follows}"
                raise Refused(name, expected=expected, came=table[name], way_out="give them one value")
        if types is None:
            if type(every) is not int or every < 1:
                raise Refused("global_attn_every_n_layers", expected="a number such as 3", came=every)
            if layers > _MOST_LAYERS:
                raise Refused("num_hidden_layers", expected=f"at most {_MOST_LAYERS}", came=layers)
            return {"global_layers": tuple(range(0, layers, every))}
        if not isinstance(types, list) or len(types) != layers or not all(one in [*_ROPES] for one in types):
            raise Refused("layer_types", expected=f"one of {' or '.join(_ROPES)} for each layer", came=types)
        return {"global_layers": tuple(i for i, one in enumerate(types) if one == "full_attention")}

    def write(config: Any) -> dict[str, Any]:
        chosen = config.which_global
        return {"layer_types": [[*_ROPES][i not in chosen] for i in range(config.layers)]}

    return Group(
        names=("layer_types", "global_attn_every_n_layers", "sliding_window", "head_dim"), read=read, write=write
    )


def _ropes() -> Group:
    """The rotary positions of both kinds of layers, nested in `rope_parameters`, or of older fields."""

    def read(table: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
        nested, older = table.get("rope_parameters") or {}, table.get("rope_scaling") or {}
        if not isinstance(nested, Mapping) or set(nested) - set(_ROPES):
            expected = f"parameters of {' and of '.join(_ROPES)}"
            raise Refused("rope_parameters", expected=expected, came=nested)
        if nested and older:
            raise Refused("rope_scaling", expected="nothing beside rope_parameters", came=older)
        if table.get("rope_theta") is not None:
            way_out = "say global_rope_theta and local_rope_theta"
            raise Refused("rope_theta", expected="nothing", came=table["rope_theta"], way_out=way_out)
        if table.get("partial_rotary_factor") not in (None, 1.0):
            came = table["partial_rotary_factor"]
            raise Refused("partial_rotary_factor", expected="1.0", came=came, way_out=WITHOUT_IT)
        return {ours_: _rope(table, kind, nested.get(kind) or older, ours) for kind, (ours_, *_) in _ROPES.items()}

    return Group(
        names=(
            *("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"),
            *[theta for _, theta, _ in _ROPES.values()],
        ),
        read=read,
        write=lambda config: {
            "rope_parameters": {kind: of_rotary(getattr(config, ours)) for kind, (ours, *_) in _ROPES.items()}
        },
    )


def _rope(table: Mapping[str, Any], kind: str, values: Mapping[str, Any], ours: Mapping[str, Any]) -> Rotary:
    _, name, default = _ROPES[kind]
    where = f"rope_parameters/{kind}" if table.get("rope_parameters") else "rope_scaling"
    theta = table.get(name)
    found = rope_parameters(values, where, default if theta is None else theta, table)
    if theta not in (None, found["rope_theta"]):
        expected = f"{found['rope_theta']} as in {where}"
        raise Refused(name, expected=expected, came=theta, way_out="give them one value")
    return rotary_of(found, ours["context"])
