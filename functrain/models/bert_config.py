"""The shape of a BERT, and what it is called with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from functrain.models.activations import ACTIVATIONS
from functrain.models.bert_layout import HEADS

Head = Literal["pretraining", "masked_lm", "sequence", "token", "pooled", "none"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of a BERT and its head.

    Of `head`, "pretraining" predicts masked tokens and whether the second sentence follows the first, "masked_lm"
    tokens alone; "sequence" gives `num_labels` numbers for a row, of one label a regression, "token" for each token;
    "pooled" gives a vector for a row, "none" one for each token. `labels` are names of the classes. `padding` is the
    token whose embedding begins as zeros and is not trained where it is read.

    `dropout` is of the embeddings and of what each block adds, `attention_dropout` of the attention weights, which the
    fused kernel cannot draw from a key, `classifier_dropout`, or else `dropout`, of what a classifier reads.
    """

    vocab: int
    context: int
    layers: int
    heads: int
    width: int
    inner: int
    head: Head = "pretraining"
    types: int = 2
    activation: str = "gelu"
    num_labels: int = 2
    labels: tuple[str, ...] | None = None
    dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float | None = None
    attention: Literal["fused", "math"] = "fused"
    eps: float = 1e-12
    padding: int | None = 0

    def __post_init__(self) -> None:
        for name in ("vocab", "context", "layers", "heads", "width", "inner", "types", "num_labels"):
            if getattr(self, name) < 1:
                raise ValueError(f"bert.Config: expected {name} of at least 1, came {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(
                f"bert.Config: width {self.width} does not divide into {self.heads} heads; "
                f"choose a width that is a multiple of {self.heads}"
            )
        for name in ("dropout", "attention_dropout", "classifier_dropout"):
            if not 0.0 <= (getattr(self, name) or 0.0) < 1.0:
                raise ValueError(f"bert.Config: expected {name} in [0, 1), came {getattr(self, name)}")
        if not 0.0 <= self.eps < 1.0:
            raise ValueError(f"bert.Config: expected eps in [0, 1), came {self.eps}")
        if self.padding is not None and not 0 <= self.padding < self.vocab:
            raise ValueError(f"bert.Config: expected padding in [0, {self.vocab}) or None, came {self.padding}")
        for name, choices in (("head", HEADS), ("activation", ACTIVATIONS), ("attention", ("fused", "math"))):
            if getattr(self, name) not in choices:
                known = ", ".join(map(repr, choices))
                raise ValueError(f"bert.Config: expected {name} of {known}, came {getattr(self, name)!r}")
        if self.labels is not None and len(self.labels) != self.num_labels:
            raise ValueError(f"bert.Config: expected {self.num_labels} labels, as num_labels says, came {self.labels}")
        if self.attention == "fused" and self.attention_dropout > 0.0:
            raise ValueError(
                f"bert.Config: fused attention cannot drop weights by a key, came attention_dropout="
                f"{self.attention_dropout}; choose attention='math' or attention_dropout=0.0"
            )

    @property
    def has_pooler(self) -> bool:
        return self.head in ("pretraining", "sequence", "pooled")

    def check(self, tokens: Tensor, types: Tensor | None, mask: Tensor | None) -> None:
        """Raise unless tokens are integers (B, T) with T up to the context, and the others fit them."""
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.context:
            expected = f"tokens (B, T) with T from 1 to the context {self.context}"
            raise ValueError(f"bert: expected {expected}, came {tuple(tokens.shape)}; cut longer rows")
        for name, given in (("types", types), ("mask", mask)):
            if given is not None and given.shape != tokens.shape:
                raise ValueError(
                    f"bert: expected {name} {tuple(tokens.shape)} as the tokens, came {tuple(given.shape)}"
                )
        for name, given in (("tokens", tokens), ("types", types)):
            if given is not None and given.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"bert: expected int64 or int32 {name}, came {given.dtype}; pass {name}.long()")
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"bert: expected a boolean mask, true at tokens, came {mask.dtype}; pass mask.bool()")
