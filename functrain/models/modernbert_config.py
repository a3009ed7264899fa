"""The shape of a ModernBERT, and what it is called with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from functrain.models.activations import ACTIVATIONS
from functrain.models.modernbert_layout import HEADS
from functrain.nn import Rotary

Head = Literal["masked_lm", "sequence", "token", "none"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of a ModernBERT and its head.

    Of `head`, "masked_lm" predicts masked tokens; "sequence" gives `num_labels` numbers for a row, of one label a
    regression, from the row's first token or, with `pooling="mean"`, from the mean of its tokens; "token" gives them
    for each token; "none" gives a vector for each token. `labels` are names of the classes. `padding` is the token
    whose embedding is not trained where it is read.

    In the `global_layers`, each third from the first unless given, a token sees all others, turned by `global_rope`; in
    the others those at most `window` // 2 places away, turned by `local_rope`. The decoder of "masked_lm" has the
    matrix of the embeddings if it is `tied`, and else its own.

    `embedding_dropout` is of the embeddings, `attention_dropout` of the attention weights, which the fused kernel
    cannot draw from a key, and of what attention adds, `mlp_dropout` of the inside of the MLP, `classifier_dropout` of
    what a classifier reads.
    """

    vocab: int
    context: int
    layers: int
    heads: int
    width: int
    inner: int
    head: Head = "masked_lm"
    window: int = 128
    global_layers: tuple[int, ...] | None = None
    global_rope: Rotary = field(default_factory=lambda: Rotary(base=160_000.0))
    local_rope: Rotary = field(default_factory=Rotary)
    activation: str = "gelu"
    head_activation: str = "gelu"
    num_labels: int = 2
    labels: tuple[str, ...] | None = None
    pooling: Literal["cls", "mean"] = "cls"
    tied: bool = True
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    decoder_bias: bool = True
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    mlp_dropout: float = 0.0
    classifier_dropout: float = 0.0
    attention: Literal["fused", "math"] = "fused"
    eps: float = 1e-5
    padding: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab", "context", "layers", "heads", "width", "inner", "window", "num_labels"):
            if getattr(self, name) < 1:
                raise ValueError(f"modernbert.Config: expected {name} of at least 1, came {getattr(self, name)}")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"modernbert.Config: width {self.width} does not divide into {self.heads} heads of an even width, "
                f"which rotary positions turn in pairs; choose a width that is a multiple of {2 * self.heads}"
            )
        for number in self.global_layers or ():
            if not 0 <= number < self.layers:
                raise ValueError(f"modernbert.Config: expected global_layers in [0, {self.layers}), came {number}")
        for name in ("embedding_dropout", "attention_dropout", "mlp_dropout", "classifier_dropout", "eps"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"modernbert.Config: expected {name} in [0, 1), came {getattr(self, name)}")
        if self.padding is not None and not 0 <= self.padding < self.vocab:
            raise ValueError(f"modernbert.Config: expected padding in [0, {self.vocab}) or None, came {self.padding}")
        known = {"head": HEADS, "activation": ACTIVATIONS, "head_activation": ACTIVATIONS, "pooling": ("cls", "mean")}
        for name, choices in {**known, "attention": ("fused", "math")}.items():
            if getattr(self, name) not in choices:
                expected = ", ".join(map(repr, choices))
                raise ValueError(f"modernbert.Config: expected {name} of {expected}, came {getattr(self, name)!r}")
        if self.labels is not None and len(self.labels) != self.num_labels:
            expected = f"{self.num_labels} labels, as num_labels says"
            raise ValueError(f"modernbert.Config: expected {expected}, came {self.labels}")
        if self.attention == "fused" and self.attention_dropout > 0.0:
            raise ValueError(
                f"modernbert.Config: fused attention cannot drop weights by a key, came attention_dropout="
                f"{self.attention_dropout}; choose attention='math' or attention_dropout=0.0"
            )

    @property
    def which_global(self) -> tuple[int, ...]:
        """The numbers of the layers in which a token sees all others, in order."""
        return tuple(range(0, self.layers, 3)) if self.global_layers is None else tuple(sorted({*self.global_layers}))

    @property
    def classifies(self) -> bool:
        return self.head in ("sequence", "token")

    def check(self, tokens: Tensor, *, mask: Tensor | None, documents: Tensor | None, positions: Tensor | None) -> None:
        """Raise unless tokens are integers (B, T) with T up to the context, and the others fit them."""
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.context:
            raise ValueError(
                f"modernbert: expected tokens (B, T) with T from 1 to the context {self.context}, came "
                f"{tuple(tokens.shape)}; cut the rows, or replace the config's context by a longer one"
            )
        for name, given in (("documents", documents), ("positions", positions), ("mask", mask)):
            if given is not None and given.shape != tokens.shape:
                raise ValueError(
                    f"modernbert: expected {name} {tuple(tokens.shape)} as the tokens, came {tuple(given.shape)}"
                )
        for name, given in (("tokens", tokens), ("documents", documents), ("positions", positions)):
            if given is not None and given.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"modernbert: expected int64 or int32 {name}, came {given.dtype}; pass {name}.long()")
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"modernbert: expected a boolean mask, true at tokens, came {mask.dtype}; pass mask.bool()")
