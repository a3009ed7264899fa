"""How transformers keeps a GPT-2: the names of its tensors and the fields of its config.json, as data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from functrain.models.layout import Field, Layout
from functrain.models.names import Names
from functrain.tree import Params

NAMES = Names(
    modules={
        "wte": "transformer.wte.weight",
        "wpe": "transformer.wpe.weight",
        "blocks/*/ln_1": "transformer.h.*.ln_1",
        "blocks/*/attn/qkv": "transformer.h.*.attn.c_attn",  # a Conv1D, (in, out) as here
        "blocks/*/attn/out": "transformer.h.*.attn.c_proj",
        "blocks/*/ln_2": "transformer.h.*.ln_2",
        "blocks/*/mlp/up": "transformer.h.*.mlp.c_fc",
        "blocks/*/mlp/down": "transformer.h.*.mlp.c_proj",
        "ln_f": "transformer.ln_f",
    }
)


def layout(config: Callable[..., Any], init: Callable[[Any, Tensor], Params]) -> Layout:
    """Return how transformers keeps a GPT-2 of this config, from its fields as keywords, and of these parameters."""
    return Layout(
        model_type="gpt2",
        architecture="GPT2LMHeadModel",
        prefix="transformer.",
        names=NAMES,
        tied={"lm_head.weight": "wte"},
        ignored=("h.*.attn.bias", "h.*.attn.masked_bias"),  # the causal mask, which older files hold
        fields={
            "vocab": Field("vocab_size", 50257),
            "context": Field("n_positions", 1024),
            "layers": Field("n_layer", 12),
            "heads": Field("n_head", 12),
            "width": Field("n_embd", 768),
            "dropout": Field(("resid_pdrop", "embd_pdrop"), 0.1),
            "attention_dropout": Field("attn_pdrop", 0.1),
            "eps": Field("layer_norm_epsilon", 1e-5),
        },
        config=config,
        init=init,
        fixed=_fixed,
        silent=(
            *("n_ctx", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
            "summary_first_dropout",
        ),
        ours=("attention",),
    )


def _fixed(config: Any) -> dict[str, Sequence[Any]]:
    return {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),  # three spellings of one formula
        "n_inner": (None, 4 * config.width),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    }
