"""How transformers keeps a BERT: the names of its tensors and the fields of its config.json, as data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from functrain.models.activations import ACTIVATIONS
from functrain.models.layout import Field, Layout
from functrain.models.names import Names
from functrain.models.shared_fields import class_labels
from functrain.tree import Params

HEADS = {
    "pretraining": "BertForPreTraining",
    "masked_lm": "BertForMaskedLM",
    "sequence": "BertForSequenceClassification",
    "token": "BertForTokenClassification",
    "pooled": "BertModel",
    "none": "BertModel",
}

_LAYER = "bert.encoder.layer.*"


def names(config: Any) -> Names:
    """Return the names of a BERT's tensors in transformers; a head that the config lacks has none."""
    turned = {
        "pooler/weight": config.has_pooler,
        "masked_lm/transform/weight": config.head in ("pretraining", "masked_lm"),
        "next_sentence/weight": config.head == "pretraining",
        "classifier/weight": config.head in ("sequence", "token"),
    }
    return Names(
        modules={
            "embeddings/tokens": "bert.embeddings.word_embeddings.weight",
            "embeddings/positions": "bert.embeddings.position_embeddings.weight",
            "embeddings/types": "bert.embeddings.token_type_embeddings.weight",
            "embeddings/norm": "bert.embeddings.LayerNorm",
            "blocks/*/attn/out": f"{_LAYER}.attention.output.dense",
            "blocks/*/attn/norm": f"{_LAYER}.attention.output.LayerNorm",
            "blocks/*/mlp/up": f"{_LAYER}.intermediate.dense",
            "blocks/*/mlp/down": f"{_LAYER}.output.dense",
            "blocks/*/mlp/norm": f"{_LAYER}.output.LayerNorm",
            "pooler": "bert.pooler.dense",
            "masked_lm/transform": "cls.predictions.transform.dense",
            "masked_lm/norm": "cls.predictions.transform.LayerNorm",
            "masked_lm/bias": "cls.predictions.bias",
            "next_sentence": "cls.seq_relationship",
            "classifier": "classifier",
        },
        joined={"blocks/*/attn/qkv": {f"{_LAYER}.attention.self.{name}": 1 for name in ("query", "key", "value")}},
        transposed=[
            *("blocks/*/attn/qkv/weight", "blocks/*/attn/out/weight", "blocks/*/mlp/up/weight"),
            *("blocks/*/mlp/down/weight", *[path for path, there in turned.items() if there]),
        ],
    )


def _tied(config: Any) -> dict[str, str]:
    if config.head not in ("pretraining", "masked_lm"):
        return {}
    return {
        "cls.predictions.decoder.weight": "embeddings/tokens",
        "cls.predictions.decoder.bias": "masked_lm/bias",
    }


def layout(config: Callable[..., Any], init: Callable[[Any, Tensor], Params]) -> Layout:
    """Return how transformers keeps a BERT of this config, from its fields as keywords, and of these parameters."""
    return Layout(
        model_type="bert",
        architecture=HEADS,
        prefix="bert.",
        names=names,
        tied=_tied,
        ignored=("embeddings.position_ids",),  # a buffer that older files hold
        older={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
        heads=("cls.**", "classifier.**", "qa_outputs.**", "bert.pooler.**"),
        fields={
            "vocab": Field("vocab_size", 30522),
            "context": Field("max_position_embeddings", 512),
            "layers": Field("num_hidden_layers", 12),
            "heads": Field("num_attention_heads", 12),
            "width": Field("hidden_size", 768),
            "inner": Field("intermediate_size", 3072),
            "types": Field("type_vocab_size", 2),
            "activation": Field("hidden_act", "gelu", choices=tuple(ACTIVATIONS)),
            "dropout": Field("hidden_dropout_prob", 0.1),
            "attention_dropout": Field("attention_probs_dropout_prob", 0.1),
            "classifier_dropout": Field("classifier_dropout", None, kind=float, null=lambda ours: None),
            "eps": Field("layer_norm_eps", 1e-12),
            "padding": Field("pad_token_id", 0, kind=int, null=lambda ours: None),
        },
        groups=(class_labels(),),
        config=config,
        init=init,
        fixed=_fixed,
        silent=("gradient_checkpointing",),
        ours=("attention",),
    )


def _fixed(config: Any) -> dict[str, Sequence[Any]]:
    return {
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,) if config.head in ("pretraining", "masked_lm") else (True, False),
    }
