"""The shape of a model of the Llama family, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from functrain.nn import Rotary


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of a model of the Llama family.

    `heads` of queries share `key_heads` of keys and values, all of `head_width`; by default as many, and width / heads.
    Of a `window`, in all layers or in `window_layers`, a token sees itself and the window - 1 tokens before it. With
    `experts`, the layers that are not `dense_layers` have a mixture of so many of them, each of `expert_inner`, by
    default `inner`, and a token has `experts_per_token`, whose weights are `experts_normalized` to 1. "math" attention
    is on a CPU the faster one for short contexts; see `functrain.nn.attention`.
    """

    vocab: int
    context: int
    layers: int
    heads: int
    width: int
    inner: int
    key_heads: int | None = None
    head_width: int | None = None
    rope: Rotary = field(default_factory=Rotary)
    window: int | None = None
    window_layers: tuple[int, ...] | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    experts: int = 0
    experts_per_token: int = 2
    experts_normalized: bool = True
    expert_inner: int | None = None
    dense_layers: tuple[int, ...] = ()
    attention_dropout: float = 0.0
    attention: Literal["fused", "math"] = "fused"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("vocab", "context", "layers", "heads", "width", "inner", "experts_per_token"):
            if getattr(self, name) < 1:
                raise ValueError(f"llama.Config: expected {name} of at least 1, came {getattr(self, name)}")
        for name in ("key_heads", "head_width", "window", "expert_inner"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"llama.Config: expected {name} of at least 1 or None, came {getattr(self, name)}")
        if self.head_width is None and self.width % self.heads:
            raise ValueError(
                f"llama.Config: width {self.width} does not divide into {self.heads} heads; choose a width that is a "
                f"multiple of {self.heads}, or head_width"
            )
        if self.heads % self.heads_of_keys:
            raise ValueError(
                f"llama.Config: {self.heads} heads do not divide into {self.key_heads} groups; choose key_heads that "
                f"divides {self.heads}"
            )
        if self.width_of_head % 2:
            raise ValueError(
                f"llama.Config: expected heads of an even width, which rotary positions turn in pairs, came "
                f"{self.width_of_head}; choose another head_width"
            )
        if not 0.0 <= self.attention_dropout < 1.0:
            raise ValueError(f"llama.Config: expected attention_dropout in [0, 1), came {self.attention_dropout}")
        if not 0.0 <= self.eps < 1.0:
            raise ValueError(f"llama.Config: expected eps in [0, 1), came {self.eps}")
        if self.attention not in ("fused", "math"):
            raise ValueError(f"llama.Config: expected attention 'fused' or 'math', came {self.attention!r}")
        self._check_layers()
        self._check_experts()

    @property
    def heads_of_keys(self) -> int:
        return self.heads if self.key_heads is None else self.key_heads

    @property
    def width_of_head(self) -> int:
        return self.width // self.heads if self.head_width is None else self.head_width

    @property
    def inner_of_expert(self) -> int:
        return self.inner if self.expert_inner is None else self.expert_inner

    @property
    def windows(self) -> list[int | None]:
        """The window of each layer, None of those that see all that came before."""
        chosen = range(self.layers) if self.window_layers is None else self.window_layers
        return [self.window if i in chosen else None for i in range(self.layers)]

    @property
    def expert_layers(self) -> list[int]:
        """The numbers of the layers that have experts."""
        return [i for i in range(self.layers) if self.experts and i not in self.dense_layers]

    def check(
        self,
        tokens: Tensor,
        *,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Refuse tokens, and what lies beside them, of another shape or kind. Raises: ValueError, TypeError."""
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.context:
            came = tuple(tokens.shape)
            raise ValueError(
                f"llama: expected tokens (B, T) with T from 1 to the context {self.context}, came {came}; cut "
                "the text, or replace the config's context by a longer one"
            )
        for name, given in (("tokens", tokens), ("documents", documents), ("positions", positions)):
            if given is not None and given.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"llama: expected int64 or int32 {name}, came {given.dtype}; pass {name}.long()")
        for name, given in (("documents", documents), ("positions", positions), ("mask", mask)):
            if given is not None and given.shape != tokens.shape:
                came = tuple(given.shape)
                raise ValueError(
                    f"llama: expected {name} in the shape of the tokens {tuple(tokens.shape)}, came {came}"
                )
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"llama: expected a boolean mask, false at padding, came {mask.dtype}; pass mask.bool()")

    def _check_layers(self) -> None:
        for name in ("window_layers", "dense_layers"):
            for number in getattr(self, name) or ():
                if not 0 <= number < self.layers:
                    raise ValueError(f"llama.Config: expected {name} in [0, {self.layers}), came {number}")
        if self.window_layers and self.window is None:
            raise ValueError("llama.Config: expected a window beside window_layers, came None; leave both out")

    def _check_experts(self) -> None:
        if self.experts < 0 or (self.experts and self.experts_per_token > self.experts):
            raise ValueError(
                f"llama.Config: expected experts_per_token of at most the {self.experts} experts, came "
                f"{self.experts_per_token}; choose fewer a token"
            )
        if not self.experts and (self.dense_layers or self.expert_inner is not None):
            raise ValueError("llama.Config: expected experts beside dense_layers and expert_inner, came 0")
        if self.experts and self.mlp_bias and not self.dense_layers:
            raise ValueError("llama.Config: expected no mlp_bias where all layers have experts, which have none")
