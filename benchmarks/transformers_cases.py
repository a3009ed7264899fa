"""Modules of transformers beside which `models_beside_transformers.py` trains ours: sizes, batches, losses.

B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import functrain as ft

Batch = dict[str, Tensor]


class Case(NamedTuple):
    """A module of transformers, and how it and ours are trained."""

    kind: str  # the class of transformers
    sizes: dict[str, dict[str, Any]]  # fields of its config by the name of the size
    batches: dict[str, tuple[int, ...]]  # (B, T), or the number of images
    batch: Callable[[Any, tuple[int, ...]], Batch]  # of their config
    theirs: Callable[[Any, Batch], Tensor]  # the mean loss of the module
    model: str  # of ft.models
    loss: Callable[[Any, Any, Any, Batch], Any]  # of the module of ft.models, params, config


def tokens_of(config: Any, shape: tuple[int, ...]) -> Batch:
    tokens = torch.randint(config.vocab_size, (shape[0], shape[1] + 1))
    return {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}


def next_token_of(module: Any, batch: Batch) -> Tensor:
    logits = module(input_ids=batch["tokens"], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())


def gpt2_loss(model: Any, params: Any, config: Any, batch: Batch) -> Any:
    return ft.losses.next_token_from_hidden(
        model.hidden(params, batch["tokens"], config), params["wte"], batch["targets"]
    )


def llama_loss(model: Any, params: Any, config: Any, batch: Batch) -> Any:
    hidden = model.hidden(params, batch["tokens"], config)
    return ft.losses.next_token_from_hidden(hidden, model.head(params), batch["targets"])


def pairs_of(config: Any, shape: tuple[int, ...]) -> Batch:
    """Draw rows of two sentences, of which 15 % of the tokens are masked, and some end in padding."""
    rows, count = shape
    tokens, places = torch.randint(4, config.vocab_size, shape), torch.arange(count)
    mask = (places < torch.randint(count // 2, count + 1, (rows, 1))) | (torch.arange(rows)[:, None] == 0)
    masked = (torch.rand(shape) < 0.15) & mask
    masked[0, 0] = True
    # as many as the fullest row has, the masked ones first, as ft.data.masked(..., max_predictions=) gives them
    asked = masked.long().argsort(dim=1, descending=True, stable=True)[:, : int(masked.sum(1).max())]
    return {
        "tokens": torch.where(masked, 3, torch.where(mask, tokens, 0)), "targets": tokens, "masked": masked,
        "mask": mask, "types": (places >= count // 2).long().repeat(rows, 1), "follows": torch.randint(2, (rows,)),
        "places": asked,
    }  # fmt: skip


def pretraining_of(module: Any, batch: Batch) -> Tensor:
    labels = torch.where(batch["masked"], batch["targets"], -100)
    return module(
        batch["tokens"], attention_mask=batch["mask"].long(), token_type_ids=batch["types"], labels=labels,
        next_sentence_label=batch["follows"],
    ).loss  # fmt: skip


def bert_loss(model: Any, params: Any, config: Any, batch: Batch) -> Any:
    places = batch["places"]
    targets, masked = (batch[name].gather(1, places) for name in ("targets", "masked"))
    found = model.apply(params, batch["tokens"], config, types=batch["types"], mask=batch["mask"], places=places)
    return model.pretraining_loss(found, targets, model.token_weights(masked), batch["follows"])


def bert_loss_of_all_places(model: Any, params: Any, config: Any, batch: Batch) -> Any:
    found = model.apply(params, batch["tokens"], config, types=batch["types"], mask=batch["mask"])
    return model.pretraining_loss(found, batch["targets"], model.token_weights(batch["masked"]), batch["follows"])


def images_of(config: Any, shape: tuple[int, ...]) -> Batch:
    size, rows = config.image_size, shape[0]
    return {"images": torch.randn(rows, 3, size, size), "labels": torch.randint(config.num_labels, (rows,))}


def classes_of(module: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch["images"]).logits, batch["labels"])


def vit_loss(model: Any, params: Any, config: Any, batch: Batch) -> Any:
    return ft.losses.classification(model.apply(params, batch["images"], config), batch["labels"])


DECODER: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
NONE_DROPPED = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def gpt2_size(vocab: int, context: int, layers: int, heads: int, width: int) -> dict[str, Any]:
    names = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
    return dict(zip(names, (vocab, context, layers, heads, width), strict=True)) | NO_DROPOUT | DECODER


def size_of(layers: int, heads: int, width: int, inner: int, **more: Any) -> dict[str, Any]:
    names = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size")
    return dict(zip(names, (layers, heads, width, inner), strict=True)) | more


def text(vocab: int, context: int, **more: Any) -> dict[str, Any]:
    return {"vocab_size": vocab, "max_position_embeddings": context, **more}


def llama_sizes(small: int, large: int, vocab: int, **more: Any) -> dict[str, Any]:
    more = {**DECODER, "tie_word_embeddings": True, **more}
    return {
        "tiny": size_of(2, 2, 16, 16, num_key_value_heads=1, **text(32, 16), **more),
        "small": size_of(4, 4, 256, small, num_key_value_heads=2, **text(8192, 256), **more),
        "100m": size_of(12, 12, 768, large, num_key_value_heads=4, **text(vocab, 512), **more),
    }


TEXTS: dict[str, tuple[int, ...]] = {"tiny": (2, 16), "small": (8, 256), "100m": (1, 512)}
BERT = {
    "tiny": size_of(2, 2, 16, 16, **text(32, 16), **NONE_DROPPED),
    "small": size_of(4, 4, 256, 1024, **text(8192, 256), **NONE_DROPPED),
    "100m": size_of(12, 12, 768, 3072, **text(30522, 512), **NONE_DROPPED),
}
CASES = {
    "gpt2": Case(
        "GPT2LMHeadModel",
        {
            "tiny": gpt2_size(32, 16, 2, 2, 16), "small": gpt2_size(8192, 256, 4, 4, 256),
            "100m": gpt2_size(50257, 512, 12, 12, 768),
        },
        TEXTS, tokens_of, next_token_of, "gpt2", gpt2_loss,
    ),
    "bert": Case("BertForPreTraining", BERT, TEXTS, pairs_of, pretraining_of, "bert", bert_loss),
    "bert-all": Case(
        "BertForPreTraining", BERT, TEXTS, pairs_of, pretraining_of, "bert", bert_loss_of_all_places,
    ),
    "llama": Case(
        "LlamaForCausalLM", llama_sizes(704, 2048, 32000), TEXTS, tokens_of, next_token_of, "llama", llama_loss,
    ),
    "experts": Case(
        "MixtralForCausalLM", llama_sizes(256, 384, 16384, num_local_experts=8, num_experts_per_tok=2), TEXTS,
        tokens_of, next_token_of, "llama", llama_loss,
    ),
    "vit": Case(
        "ViTForImageClassification",
        {
            "tiny": size_of(2, 2, 16, 16, image_size=8, patch_size=4, num_labels=10, **NONE_DROPPED),
            "small": size_of(4, 4, 256, 1024, image_size=64, patch_size=8, num_labels=1000, **NONE_DROPPED),
            "100m": size_of(12, 12, 768, 3072, image_size=224, patch_size=16, num_labels=1000, **NONE_DROPPED),
        },
        {"tiny": (2,), "small": (32,), "100m": (3,)}, images_of, classes_of, "vit", vit_loss,
    ),
}  # fmt: skip
