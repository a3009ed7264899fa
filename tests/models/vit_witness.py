"""ViTs of transformers, drawn, and ours beside them; both trained on the same batches."""

from __future__ import annotations

import tempfile
from typing import Any

import parity
import torch
import transformers
from hypothesis import strategies as st

import functrain as ft
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


def trained(steps: int, accumulate: int) -> tuple[list[float], list[float]]:
    """Return the losses of so many steps of ours and of transformers' module with torch.optim.AdamW, on images of bars,
    which can be told apart."""
    config = vit.Config(image=8, patch=4, channels=1, layers=2, heads=2, width=16, inner=32, num_labels=4)
    params = vit.init(config, random.key(0))
    with tempfile.TemporaryDirectory() as folder:
        path = vit.to_hf(f"{folder}/model", params, config)
        model = transformers.ViTForImageClassification.from_pretrained(path).train()
    adamw = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.01)

    def loss_fn(params: Any, batch: Any, key: Any) -> ft.Loss:
        return ft.losses.classification(vit.apply(params, batch["images"], config), batch["labels"])

    optimizer = ft.optim.adamw(1e-3, weight_decay=0.01)
    step = ft.train_step(loss_fn, optimizer, accumulate=accumulate)
    state = ft.init_state(params, optimizer, key=random.key(1))
    ours, theirs = [], []
    for t in range(steps):
        labels, noise = random.split(random.fold_in(random.key(2), t), 2).unbind()
        kinds = random.randint(labels, (8,), 0, 4)
        bars = torch.nn.functional.one_hot(kinds, 4).repeat_interleave(2, 1)[:, None, :, None]  # (B, 1, 8, 1)
        images = bars + 0.3 * random.normal(noise, (8, 1, 8, 8))
        state, metrics = step(state, {"images": images, "labels": kinds})
        ours.append(float(metrics["loss"]))
        loss = model(pixel_values=images, labels=kinds).loss
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        theirs.append(loss.item())
    return ours, theirs
