"""ViTs of transformers, drawn, and ours beside them."""

from __future__ import annotations

from typing import Any

import parity
import torch
import transformers
from hypothesis import strategies as st

from functrain import random
from functrain.models import vit
from functrain.models.vit_layout import HEADS

ACTIVATIONS = ["gelu", "gelu_new", "quick_gelu", "relu", "silu"]


@st.composite
def cases(draw: st.DrawFn) -> parity.Case:
    heads, sizes = draw(st.integers(1, 3)), st.integers(1, 3)
    patch, counts = (draw(sizes), draw(sizes)), (draw(sizes), draw(sizes))
    image = (patch[0] * counts[0], patch[1] * counts[1])
    square = image[0] == image[1] and patch[0] == patch[1]
    fields = {
        "image_size": image[0] if square and draw(st.booleans()) else list(image),
        "patch_size": patch[0] if square and draw(st.booleans()) else list(patch),
        "num_channels": draw(st.integers(1, 3)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        # of 2 numbers a norm is the sign of their difference, which rounding may decide
        "hidden_size": heads * draw(st.integers(-(-8 // heads), 10)),
        "intermediate_size": draw(st.integers(1, 20)),
        "hidden_act": draw(st.sampled_from(ACTIVATIONS)),
        "hidden_dropout_prob": draw(st.sampled_from([0.0, 0.1])),
        "attention_probs_dropout_prob": draw(st.sampled_from([0.0, 0.1])),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-5, 1e-2])),
        "qkv_bias": draw(st.booleans()),
        "pooler_output_size": draw(st.sampled_from([None, 5])),
        "pooler_act": draw(st.sampled_from(["tanh", "relu"])),
        "num_labels": draw(st.integers(1, 4)),
    }
    return case(fields, draw(st.sampled_from(["classifier", "pooled"])), draw(st.integers(0, 99)))


def case(fields: dict[str, Any], head: str, seed: int) -> parity.Case:
    config = transformers.ViTConfig(**fields, attn_implementation="eager")
    model = parity.shaken(getattr(transformers, HEADS[head])(config), seed)
    size = config.image_size if isinstance(config.image_size, list) else [config.image_size] * 2
    images = random.normal(random.fold_in(random.key(seed), 1), (3, config.num_channels, *size))

    def theirs(model: Any) -> list[torch.Tensor]:
        found = model(images)
        return [found.last_hidden_state, found.pooler_output] if head == "pooled" else [found.logits]

    def ours(params: Any, config: vit.Config) -> list[torch.Tensor]:
        found = vit.apply(params, images, config)
        return [vit.hidden(params, images, config), found] if head == "pooled" else [found]

    about = {**fields, "head": head, "seed": seed}
    return parity.Case(about, model, theirs, vit.from_hf, vit.to_hf, ours, vit.HF, in_files)


def in_files(model: Any, named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {in_file(name): tensor for name, tensor in named.items()}


def in_file(name: str) -> str:
    """Return what a parameter of transformers' module is called in files, which have the names of older versions."""
    for now, then in {
        "layers.": "encoder.layer.", "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key", "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    }.items():  # fmt: skip
        name = name.replace(now, then)
    return name
