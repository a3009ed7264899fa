"""BERTs of transformers of all heads, drawn, and ours beside them; both trained on the same batches."""

from __future__ import annotations

import tempfile
from typing import Any

import parity
import torch
import transformers
from hypothesis import strategies as st

import functrain as ft
from functrain import random
from functrain.models import bert
from functrain.models.bert_layout import HEADS

ACTIVATIONS = [
    "gelu",
    "gelu_new",
    "gelu_pytorch_tanh",
    "gelu_fast",
    "gelu_python",
    "quick_gelu",
    "relu",
    "silu",
    "tanh",
]


@st.composite
def cases(draw: st.DrawFn) -> parity.Case:
    heads, head = (
        draw(st.integers(1, 3)),
        draw(st.sampled_from(["pretraining", "masked_lm", "sequence", "token", "pooled"])),
    )
    fields = {
        "vocab_size": draw(st.integers(5, 40)),
        "max_position_embeddings": draw(st.integers(6, 12)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        # of 2 numbers a norm is the sign of their difference, which rounding may decide
        "hidden_size": heads * draw(st.integers(-(-8 // heads), 10)),
        "intermediate_size": draw(st.integers(1, 20)),
        "type_vocab_size": draw(st.integers(1, 3)),
        "hidden_act": draw(st.sampled_from(ACTIVATIONS)),
        "hidden_dropout_prob": draw(st.sampled_from([0.0, 0.1])),
        "attention_probs_dropout_prob": draw(st.sampled_from([0.0, 0.1])),
        "classifier_dropout": draw(st.sampled_from([None, 0.0, 0.2])),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-5, 1e-2])),
        "pad_token_id": draw(st.sampled_from([0, 3, None])),
        "num_labels": draw(st.integers(1, 4)),
    }
    return case(fields, head, draw(st.integers(0, 99)), masked=draw(st.booleans()), typed=draw(st.booleans()))


def case(fields: dict[str, Any], head: str, seed: int, *, masked: bool = True, typed: bool = True) -> parity.Case:
    config = transformers.BertConfig(**fields, attn_implementation="eager")
    model = parity.shaken(getattr(transformers, HEADS[head])(config), seed)
    # three rows of which the second ends early, with padding that may stand within a row, too
    batch, count = 3, config.max_position_embeddings - 1
    key = random.key(seed)
    tokens = random.randint(random.fold_in(key, 1), (batch, count), 0, config.vocab_size)
    tokens[0, 1] = config.pad_token_id or 0
    types = random.randint(random.fold_in(key, 2), (batch, count), 0, config.type_vocab_size) if typed else None
    mask = torch.arange(count)[None] < torch.tensor([count, count // 2 + 1, count - 1])[:, None] if masked else None

    def theirs(model: Any) -> list[torch.Tensor]:
        inputs = {"token_type_ids": types, "attention_mask": None if mask is None else mask.long()}
        found = model(tokens, **{name: x for name, x in inputs.items() if x is not None})
        if head == "pretraining":
            return [found.prediction_logits, found.seq_relationship_logits]
        return [found.pooler_output] if head == "pooled" else [found.logits]

    def ours(params: Any, config: bert.Config) -> list[torch.Tensor]:
        found = bert.apply(params, tokens, config, types=types, mask=mask)
        return list(found) if head == "pretraining" else [found]

    about = {**fields, "head": head, "seed": seed, "masked": masked, "typed": typed}
    return parity.Case(about, model, theirs, bert.from_hf, bert.to_hf, ours, bert.HF)


def trained(steps: int, accumulate: int) -> tuple[list[float], list[float]]:
    """Return the losses of so many steps of our pre-training and of transformers' module with torch.optim.AdamW."""
    config = bert.Config(vocab=32, context=12, layers=2, heads=2, width=16, inner=32)
    params = bert.init(config, random.key(0))
    with tempfile.TemporaryDirectory() as folder:
        model = transformers.BertForPreTraining.from_pretrained(bert.to_hf(f"{folder}/model", params, config))
    model.config.hidden_dropout_prob = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.01)
    ours = ft.optim.adamw(1e-3, weight_decay=0.01)
    step = ft.train_step(loss_fn(config), ours, accumulate=accumulate)
    state = ft.init_state(params, ours, key=random.key(1))
    found: tuple[list[float], list[float]] = ([], [])
    for t in range(steps):
        batch = draw_batch(config, t)
        state, metrics = step(state, batch)
        labels = torch.where(batch["weights"] > 0, batch["targets"], -100)
        loss = model(
            batch["tokens"], attention_mask=batch["mask"].long(), token_type_ids=batch["types"], labels=labels,
            next_sentence_label=batch["next_sentence"],
        ).loss  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found[0].append(float(metrics["loss"]))
        found[1].append(loss.item())
    return found


def loss_fn(config: bert.Config) -> Any:
    def loss(params: Any, batch: Any, key: Any) -> ft.Loss:
        found = bert.apply(params, batch["tokens"], config, types=batch["types"], mask=batch["mask"])
        return bert.pretraining_loss(found, batch["targets"], batch["weights"], batch["next_sentence"])

    return loss


def draw_batch(config: bert.Config, t: int, rows: int = 8) -> dict[str, torch.Tensor]:
    """Draw pairs of rising runs of tokens, which can be learned, with unequal padding and numbers of masked tokens."""
    key = random.fold_in(random.key(2), t)
    places = torch.arange(config.context)
    first, second, share, ends = (random.randint(k, (rows, 1), 4, 12) for k in random.split(key, 4).unbind())
    later = places >= config.context // 2
    next_sentence = (second % 2)[:, 0]
    tokens = torch.where(later, first + (second % 2) * 9 + places, first + places)
    mask = places < ends
    masked = (random.uniform(random.fold_in(key, 9), tokens.shape) < share / 20) & mask
    masked[0, 1] = True
    return {
        "tokens": torch.where(masked, 3, torch.where(mask, tokens, 0)), "types": later.long().expand(rows, -1),
        "mask": mask, "targets": tokens, "weights": bert.token_weights(masked), "next_sentence": next_sentence,
    }  # fmt: skip
