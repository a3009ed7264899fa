"""How transformers keeps a ViT: the names of its tensors and the fields of its config.json, as data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from functrain.models.activations import ACTIVATIONS
from functrain.models.layout import Field, Layout
from functrain.models.names import Names
from functrain.models.shared_fields import class_labels
from functrain.tree import Params

HEADS = {"classifier": "ViTForImageClassification", "pooled": "ViTModel", "none": "ViTModel"}

_LAYER = "vit.encoder.layer.*"


def names(config: Any) -> Names:
    """Return the names of a ViT's tensors in transformers; a head that the config lacks has none."""
    head = {"classifier": ["classifier/weight"], "pooled": ["pooler/weight"], "none": []}[config.head]
    return Names(
        modules={
            "embeddings/patches": "vit.embeddings.patch_embeddings.projection",
            "embeddings/cls": "vit.embeddings.cls_token",
            "embeddings/positions": "vit.embeddings.position_embeddings",
            "blocks/*/norm_1": f"{_LAYER}.layernorm_before",
            "blocks/*/attn/out": f"{_LAYER}.attention.output.dense",
            "blocks/*/norm_2": f"{_LAYER}.layernorm_after",
            "blocks/*/mlp/up": f"{_LAYER}.intermediate.dense",
            "blocks/*/mlp/down": f"{_LAYER}.output.dense",
            "norm": "vit.layernorm",
            "pooler": "vit.pooler.dense",
            "classifier": "classifier",
        },
        joined={"blocks/*/attn/qkv": {f"{_LAYER}.attention.attention.{name}": 1 for name in ("query", "key", "value")}},
        transposed=["blocks/*/attn/*/weight", "blocks/*/mlp/*/weight", *head],
    )


def layout(config: Callable[..., Any], init: Callable[[Any, Tensor], Params]) -> Layout:
    """Return how transformers keeps a ViT of this config, from its fields as keywords, and of these parameters."""
    return Layout(
        model_type="vit",
        architecture=HEADS,
        prefix="vit.",
        names=names,
        tied={},
        ignored=(),
        heads=("classifier.**", "vit.pooler.**", "decoder.**", "vit.embeddings.mask_token"),
        fields={
            "image": Field("image_size", 224, kind=int | list[int]),
            "patch": Field("patch_size", 16, kind=int | list[int]),
            "channels": Field("num_channels", 3),
            "layers": Field("num_hidden_layers", 12),
            "heads": Field("num_attention_heads", 12),
            "width": Field("hidden_size", 768),
            "inner": Field("intermediate_size", 3072),
            "activation": Field("hidden_act", "gelu", choices=tuple(ACTIVATIONS)),
            "qkv_bias": Field("qkv_bias", True),
            "pooler_width": Field("pooler_output_size", None, kind=int, null=lambda ours: None),
            "pooler_activation": Field("pooler_act", "tanh", choices=tuple(ACTIVATIONS)),
            "dropout": Field("hidden_dropout_prob", 0.0),
            "attention_dropout": Field("attention_probs_dropout_prob", 0.0),
            "eps": Field("layer_norm_eps", 1e-12),
        },
        groups=(class_labels(),),
        config=config,
        init=init,
        fixed=lambda config: {},
        silent=("encoder_stride",),
        ours=("attention",),
    )
