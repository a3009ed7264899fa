"""BERTs of transformers of all heads, drawn, and ours beside them."""

from __future__ import annotations

from typing import Any

import parity
import torch
import transformers
from hypothesis import strategies as st

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
        "hidden_size": heads * draw(st.integers(1, 5)) + heads,
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

    return parity.Case(model, theirs, bert.from_hf, bert.to_hf, ours, bert.HF)
