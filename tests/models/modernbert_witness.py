"""ModernBERTs of transformers of all heads, drawn, and ours beside them; both trained on the same batches."""

from __future__ import annotations

import tempfile
from typing import Any

import parity
import torch
import transformers
from hypothesis import strategies as st

import functrain as ft
from functrain import random
from functrain.models import modernbert
from functrain.models.modernbert_layout import HEADS

ACTIVATIONS = ["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu"]
KINDS = ["full_attention", "sliding_attention"]
BIASES = ["norm_bias", "attention_bias", "mlp_bias", "classifier_bias", "decoder_bias"]
DROPOUTS = ["embedding_dropout", "attention_dropout", "mlp_dropout", "classifier_dropout"]


@st.composite
def cases(draw: st.DrawFn) -> parity.Case:
    heads, layers = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    # of 2 numbers a norm is the sign of their difference, which rounding may decide
    width = heads * draw(st.sampled_from([size for size in (4, 6, 8, 10) if size * heads >= 8]))
    fields = {
        "vocab_size": draw(st.integers(5, 40)),
        "max_position_embeddings": draw(st.integers(8, 12)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_size": width,
        "intermediate_size": draw(st.integers(1, 20)),
        "local_attention": draw(st.sampled_from([1, 2, 4, 5, 40])),
        "hidden_activation": draw(st.sampled_from(ACTIVATIONS)),
        "classifier_activation": draw(st.sampled_from(ACTIVATIONS)),
        "classifier_pooling": draw(st.sampled_from(["cls", "mean"])),
        "tie_word_embeddings": draw(st.booleans()),
        "norm_eps": draw(st.sampled_from([1e-5, 1e-2])),
        "pad_token_id": draw(st.sampled_from([0, 3, None])),
        "num_labels": draw(st.integers(1, 4)),
        **{name: draw(st.booleans()) for name in BIASES},
        **{name: draw(st.sampled_from([0.0, 0.1])) for name in DROPOUTS},
        **draw(st.sampled_from([{}, {"global_attn_every_n_layers": 2}]) | kinds_of(layers)),
        **draw(st.sampled_from([{}, {"global_rope_theta": 50.0, "local_rope_theta": 7.0}]) | ropes()),
    }
    head = draw(st.sampled_from(["masked_lm", "sequence", "token", "none"]))
    return case(fields, head, draw(st.integers(0, 99)), masked=draw(st.booleans()))


def kinds_of(layers: int) -> Any:
    kinds = st.lists(st.sampled_from(KINDS), min_size=layers, max_size=layers)
    return st.builds(lambda kinds: {"layer_types": kinds}, kinds)


def ropes() -> Any:
    def rope(kind: str, theta: float, factor: float) -> dict[str, Any]:
        more = {"original_max_position_embeddings": 8} if kind in ("llama3", "yarn") else {}
        more |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
        more |= {} if kind == "default" else {"factor": factor}
        return {"rope_type": kind, "rope_theta": theta, **more}

    each = st.builds(
        rope, st.sampled_from(["default", "linear", "dynamic", "llama3", "yarn"]), st.sampled_from([100.0, 10000.0]),
        st.sampled_from([1.5, 4.0]),
    )  # fmt: skip
    return st.builds(lambda a, b: {"rope_parameters": dict(zip(KINDS, (a, b), strict=True))}, each, each)


def case(fields: dict[str, Any], head: str, seed: int, *, masked: bool = True) -> parity.Case:
    config = transformers.ModernBertConfig(**fields, attn_implementation="eager")
    model = parity.shaken(getattr(transformers, HEADS[head])(config), seed)
    # three rows of which the second ends early, and which may hold the token of padding within, too
    batch, count = 3, config.max_position_embeddings - 1
    tokens = random.randint(random.fold_in(random.key(seed), 1), (batch, count), 0, config.vocab_size)
    tokens[0, 1] = config.pad_token_id or 0
    mask = torch.arange(count)[None] < torch.tensor([count, count // 2 + 1, count - 1])[:, None]

    def real(x: torch.Tensor) -> list[torch.Tensor]:
        # a place of padding that sees nothing has the mean of all there, and zeros here
        return [x[mask] if masked and head != "sequence" else x]

    def theirs(model: Any) -> list[torch.Tensor]:
        found = model(tokens, attention_mask=mask.long()) if masked else model(tokens)
        return real(found.last_hidden_state if head == "none" else found.logits)

    def ours(params: Any, config: modernbert.Config) -> list[torch.Tensor]:
        return real(modernbert.apply(params, tokens, config, mask=mask if masked else None))

    about = {**fields, "head": head, "seed": seed, "masked": masked}
    return parity.Case(about, model, theirs, modernbert.from_hf, modernbert.to_hf, ours, modernbert.HF)


def trained(steps: int, accumulate: int) -> tuple[list[float], list[float]]:
    """Return the losses of so many steps of masked language modelling, ours and of transformers' module with
    torch.optim.AdamW."""
    config = modernbert.Config(vocab=32, context=12, layers=3, heads=2, width=16, inner=24, window=4)
    params = modernbert.init(config, random.key(0))
    with tempfile.TemporaryDirectory() as folder:
        path = modernbert.to_hf(f"{folder}/model", params, config)
        model = transformers.ModernBertForMaskedLM.from_pretrained(path).train()
    adamw = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.01)

    def loss_fn(params: Any, batch: Any, key: Any) -> ft.Loss:
        logits = modernbert.apply(params, batch["tokens"], config, mask=batch["real"])
        return ft.losses.classification(logits, batch["targets"], batch["mask"])

    optimizer = ft.optim.adamw(1e-3, weight_decay=0.01)
    step = ft.train_step(loss_fn, optimizer, accumulate=accumulate)
    state = ft.init_state(params, optimizer, key=random.key(1))
    ours, theirs = [], []
    for t in range(steps):
        batch = draw_batch(t)
        state, metrics = step(state, batch)
        ours.append(float(metrics["loss"]))
        labels = torch.where(batch["mask"], batch["targets"], -100)
        loss = model(batch["tokens"], attention_mask=batch["real"].long(), labels=labels).loss
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        theirs.append(loss.item())
    return ours, theirs


def draw_batch(t: int, rows: int = 8) -> dict[str, torch.Tensor]:
    """Draw rising runs of tokens, which can be learned, with unequal padding and numbers of masked tokens."""
    key = random.fold_in(random.key(2), t)
    places = torch.arange(12)
    first, share, ends = (random.randint(k, (rows, 1), 5, 13) for k in random.split(key, 3).unbind())
    tokens, real = first + places, places < ends
    mask = (random.uniform(random.fold_in(key, 9), tokens.shape) < share / 30) & real
    mask[0, 1] = True
    given = torch.where(mask, 3, torch.where(real, tokens, 0))
    return {"tokens": given, "targets": tokens, "mask": mask, "real": real.expand(rows, -1)}
