"""Rotary position embeddings: queries and keys turned by angles that grow with their position.

B batch, T tokens, H heads, K width of a head.

A model computes the angles once for all layers, `cos, sin = rotary_angles(positions, K, rotary)`, and turns each
layer's queries and keys by `rotate(q, cos, sin)`. A pair of numbers that turns together lies K / 2 apart, as in
transformers and in its checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """How positions become angles: what transformers calls `rope_parameters`.

    Pair i turns by position / base ** (2 i / K), and for texts longer than the `original` context, those trained on,
    slower: "linear", all by `factor`; "dynamic", by a base that grows with the row's length; "llama3", slow pairs by
    `factor`, fast ones not, and between wavelengths of `original` / `high` and `original` / `low` a mixture; "yarn",
    the same with a ramp between pairs of `beta_fast` and `beta_slow` turns in the original context, and scores scaled
    by `attention_factor`, by default 0.1 log(factor) + 1, or what `mscale` and `mscale_all` make of it.

    A field of another kind than the one chosen is an error.

    Source: Su et al. 2021 (arXiv:2104.09864); Chen et al. 2023 (arXiv:2306.15595) for linear; Peng et al. 2023
    (arXiv:2309.00071) for dynamic and yarn; Dubey et al. 2024 (arXiv:2407.21783) for llama3.
    """

    kind: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
    base: float = 10000.0
    factor: float | None = None
    original: int | None = None
    low: float | None = None
    high: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all: float | None = None
    truncate: bool | None = None

    def __post_init__(self) -> None:
        if self.kind not in _NEEDS:
            raise ValueError(f"Rotary: expected a kind of {', '.join(_NEEDS)}, came {self.kind!r}")
        if not self.base > 1.0:
            raise ValueError(f"Rotary: expected a base above 1, came {self.base}")
        given = {name for name in (*_ALL, "truncate") if getattr(self, name) is not None}
        for name in _NEEDS[self.kind]:
            if name not in given:
                raise ValueError(
                    f"Rotary: {self.kind}: expected {name}, came None; say what the model was trained with"
                )
        if others := sorted(given - {*_NEEDS[self.kind], *_MAY.get(self.kind, ())}):
            raise ValueError(f"Rotary: {self.kind}: expected no {others[0]}, which it has no use for; leave it out")
        for name in given - {"truncate"}:
            if not getattr(self, name) > 0.0:
                raise ValueError(f"Rotary: expected {name} above 0, came {getattr(self, name)}")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"Rotary: llama3: expected low below high, came {self.low} and {self.high}")


_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original"),
    "llama3": ("factor", "original", "low", "high"),
    "yarn": ("factor", "original"),
}
_MAY = {"yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all", "truncate")}
_ALL = ("factor", "original", "low", "high", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all")


def rotary_angles(positions: Tensor, width: int, rotary: Rotary | None = None) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines by which `rotate` turns heads of `width` at these positions, float32.

    Equals what `ROPE_INIT_FUNCTIONS` of transformers make. "dynamic" takes a row's largest position for its length, so
    that a row alone equals the row in its batch.

    Shapes: positions (..., T), any integers; the result twice (..., T, K / 2).
    Raises: ValueError for an odd width.

    >>> cos, sin = ft.nn.rotary_angles(torch.arange(3), 4)
    >>> sin
    tensor([[0.0000, 0.0000],
            [0.8415, 0.0100],
            [0.9093, 0.0200]])
    """
    rotary = rotary or Rotary()
    if width % 2 or (rotary.kind == "dynamic" and width < 4):
        least = " of at least 4" if rotary.kind == "dynamic" else ""
        raise ValueError(f"rotary_angles: expected an even width of a head{least}, came {width}; pairs turn together")
    frequencies = _frequencies(positions, width, rotary)  # (K / 2,), or (..., 1, K / 2) of each row
    angles = positions[..., None].float() * frequencies  # (..., T, K / 2)
    scale = _attention_factor(rotary)
    cos, sin = torch.cos(angles), torch.sin(angles)
    return (cos, sin) if scale == 1.0 else (cos * scale, sin * scale)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return heads x (B, H, T, K) turned by the angles of their positions; computed in float32, returned in x's dtype.

    Shapes: cos and sin (T, K / 2) or (B, T, K / 2), as `rotary_angles` makes them.

    >>> cos, sin = ft.nn.rotary_angles(torch.arange(2), 2)
    >>> ft.nn.rotate(torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]]), cos, sin)
    tensor([[[[1.0000, 0.0000],
              [0.5403, 0.8415]]]])
    """
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)  # (B or 1, 1, T, K / 2)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def _frequencies(positions: Tensor, width: int, rotary: Rotary) -> Tensor:
    exponents = torch.arange(0, width, 2, device=positions.device).float() / width  # (K / 2,)
    factor, original = rotary.factor or 1.0, rotary.original or 1
    if rotary.kind == "dynamic":
        length = (positions.amax(-1, keepdim=True)[..., None] + 1).clamp(min=original)  # (..., 1, 1)
        grown = (factor * length / original - (factor - 1)) ** (width / (width - 2))
        return 1.0 / (rotary.base * grown) ** exponents
    plain = 1.0 / rotary.base**exponents
    if rotary.kind == "linear":
        return plain / factor
    if rotary.kind == "llama3":
        low, high = rotary.low or 1.0, rotary.high or 4.0
        turns = original * plain / (2 * math.pi)  # in the original context
        share = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return plain * (share + (1 - share) / factor)
    if rotary.kind == "yarn":
        share = 1 - _ramp(*_yarn_range(width, rotary), exponents)
        return plain * (share + (1 - share) / factor)
    return plain


def _yarn_range(width: int, rotary: Rotary) -> tuple[float, float]:
    """Return the pairs between which yarn goes from the frequencies as they are to those divided by the factor."""

    def pair_of(turns: float) -> float:
        assert rotary.original is not None
        return width * math.log(rotary.original / (turns * 2 * math.pi)) / (2 * math.log(rotary.base))

    first, last = pair_of(rotary.beta_fast or 32.0), pair_of(rotary.beta_slow or 1.0)
    if rotary.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    return max(first, 0), min(last, width - 1)


def _ramp(first: float, last: float, like: Tensor) -> Tensor:
    last = last + 0.001 if first == last else last
    return ((torch.arange(len(like), device=like.device) - first) / (last - first)).clamp(0.0, 1.0)


def _attention_factor(rotary: Rotary) -> float:
    if rotary.kind != "yarn":
        return 1.0
    if rotary.attention_factor is not None:
        return rotary.attention_factor

    def of(mscale: float) -> float:
        factor = rotary.factor or 1.0
        return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0

    if rotary.mscale and rotary.mscale_all:
        return of(rotary.mscale) / of(rotary.mscale_all)
    return of(1.0)
