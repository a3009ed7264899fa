"""The architectures that a run can pre-train, and what each is asked for; without torch, for a command's help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias


@dataclass(frozen=True, kw_only=True)
class GPT2:
    """The GPT-2."""

    architecture: Literal["gpt2"] = "gpt2"
    """gpt2, llama or bert: whose options these are."""
    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 256
    """Tokens that the model sees."""
    dropout: float = 0.0
    attention: Literal["fused", "math"] = "fused"
    """How attention is computed; math is the faster one on a CPU for short contexts."""

    def __post_init__(self) -> None:
        _check_shape(self)
        within(self, "model.", ["dropout"])

    def parameters(self, vocabulary: int) -> int:
        """Count the parameters with so many tokens."""
        width = self.width
        norms, attention, mlp = 4 * width, 4 * width * width + 4 * width, 8 * width * width + 5 * width
        return (vocabulary + self.context) * width + self.layers * (norms + attention + mlp) + 2 * width


@dataclass(frozen=True, kw_only=True)
class Llama:
    """The Llama: rotary positions, grouped queries, gated MLPs or experts."""

    architecture: Literal["llama"] = "llama"
    """gpt2, llama or bert: whose options these are."""
    layers: int = 4
    heads: int = 4
    key_heads: int = 2
    """Heads of keys and values, which the heads of queries share."""
    width: int = 128
    inner: int = 352
    """The width inside of an MLP, and of an expert."""
    context: int = 256
    """Tokens that the model sees."""
    window: int | Literal["none"] = "none"
    """Tokens that a token sees, itself among them; none: all before it in the context."""
    rope_base: float = 10000.0
    """The base of the rotary positions; a longer context wants a larger one."""
    qkv_bias: bool = False
    """Biases of queries, keys and values, as Qwen2 has them."""
    qk_norm: bool = False
    """Norms of queries and keys, as Qwen3 has them."""
    tied: bool = True
    """The head is the table of embeddings."""
    experts: int | Literal["none"] = "none"
    """Experts of each layer, in the place of its MLP."""
    experts_per_token: int | Literal["none"] = "none"
    """Experts that a token goes through."""
    balance: float | Literal["none"] = "none"
    """The coefficient of the load-balancing loss, as a rule 0.01."""
    packed: bool = False
    """Rows hold whole documents, as many as fit, and none sees another; else windows of the text."""
    attention: Literal["fused", "math"] = "fused"
    """How attention is computed; math is the faster one on a CPU for short contexts."""

    def __post_init__(self) -> None:
        _check_shape(self)
        at_least(self, "model.", {"key_heads": 1, "inner": 1})
        if self.heads % self.key_heads:
            raise ValueError(
                f"model.key_heads: expected a number that divides the {self.heads} heads, came {self.key_heads}"
            )
        if self.width // self.heads % 2:
            raise ValueError(
                f"model.heads: expected heads of an even width, for rotary positions, came {self.width // self.heads}"
            )
        if self.window != "none" and self.window < 1:
            raise ValueError(f"model.window: expected at least 1, or none, came {self.window}")
        if not 1.0 < self.rope_base < float("inf"):
            raise ValueError(f"model.rope_base: expected a finite number above 1, came {self.rope_base}")
        self._check_experts()

    def parameters(self, vocabulary: int) -> int:
        """Count the parameters with so many tokens."""
        width, each = self.width, self.width // self.heads
        keys = self.key_heads * each
        attention = 2 * width * width + 2 * width * keys
        attention += (width + 2 * keys) * self.qkv_bias + 2 * each * self.qk_norm
        mlp = 3 * width * self.inner
        if self.experts != "none":
            mlp = self.experts * (mlp + width)
        return vocabulary * width * (1 if self.tied else 2) + width + self.layers * (2 * width + attention + mlp)

    def _check_experts(self) -> None:
        if self.experts == "none":
            for name in ("experts_per_token", "balance"):
                if getattr(self, name) != "none":
                    raise ValueError(
                        f"model.{name}: expected none, for a model without experts, came {getattr(self, name)}; "
                        "choose model.experts"
                    )
            return
        if self.experts < 1:
            raise ValueError(f"model.experts: expected at least 1, or none, came {self.experts}")
        if self.experts_per_token == "none" or not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(
                f"model.experts_per_token: expected 1 to {self.experts}, the number of experts, came "
                f"{self.experts_per_token}"
            )
        if self.balance == "none" or not 0.0 <= self.balance < float("inf"):
            raise ValueError(
                f"model.balance: expected a finite number of at least 0, came {self.balance}; 0.01 is usual"
            )


@dataclass(frozen=True, kw_only=True)
class Bert:
    """The BERT, trained on masked tokens and on whether the second sentence follows the first."""

    architecture: Literal["bert"] = "bert"
    """gpt2, llama or bert: whose options these are."""
    layers: int = 4
    heads: int = 4
    width: int = 128
    inner: int = 512
    """The width inside of an MLP."""
    context: int = 128
    """Tokens of a pair of sentences, with [CLS] and twice [SEP]."""
    dropout: float = 0.0
    mask_rate: float = 0.15
    """The part of the tokens that are to be found again."""
    whole_words: bool = False
    """Words are chosen, with all their tokens; else tokens."""
    max_predictions: int | Literal["all"] = "all"
    """Tokens of a row that are chosen at most; logits are computed of so many places, and of all with "all"."""
    attention: Literal["fused", "math"] = "fused"
    """How attention is computed; math is the faster one on a CPU for short contexts."""

    def __post_init__(self) -> None:
        _check_shape(self)
        at_least(self, "model.", {"inner": 1, "context": 5})
        within(self, "model.", ["dropout"])
        if not 0.0 < self.mask_rate < 1.0:
            raise ValueError(f"model.mask_rate: expected a part above 0 and below 1, came {self.mask_rate}")
        if self.max_predictions != "all" and not 1 <= self.max_predictions <= self.context:
            raise ValueError(
                f"model.max_predictions: expected 1 to {self.context}, the context, or all, came {self.max_predictions}"
            )

    def parameters(self, vocabulary: int) -> int:
        """Count the parameters with so many tokens."""
        width, inner = self.width, self.inner
        block = 4 * width * width + 4 * width + 2 * width * inner + inner + width + 4 * width
        heads = 2 * (width * width + width) + 2 * width + vocabulary + 2 * width + 2
        return (vocabulary + self.context + 2) * width + 2 * width + self.layers * block + heads


Model: TypeAlias = GPT2 | Llama | Bert


def _check_shape(model: Any) -> None:
    at_least(model, "model.", {"layers": 1, "heads": 1, "width": 1, "context": 1})
    if model.width % model.heads:
        raise ValueError(f"model.heads: expected a number that divides the width {model.width}, came {model.heads}")


def at_least(config: Any, prefix: str, counts: dict[str, int]) -> None:
    """Raise a ValueError for a field that is less than it may be."""
    for name, least in counts.items():
        if getattr(config, name) < least:
            raise ValueError(f"{prefix}{name}: expected at least {least}, came {getattr(config, name)}")


def within(config: Any, prefix: str, parts: Sequence[str]) -> None:
    """Raise a ValueError for a field that is no part of a whole."""
    for name in parts:
        if not 0.0 <= getattr(config, name) < 1.0:
            raise ValueError(f"{prefix}{name}: expected a number in [0, 1), came {getattr(config, name)}")
