"""The shape of a ViT, and what it is called with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from functrain.models.activations import ACTIVATIONS
from functrain.models.vit_layout import HEADS

Head = Literal["classifier", "pooled", "none"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of a ViT and its head.

    `image` and `patch` are sizes in pixels, one number or (height, width). Of `head`, "classifier" gives `num_labels`
    logits for an image, "pooled" a vector of `pooler_width`, or else of the width, "none" one for each patch, after
    that of the class token. `labels` are names of the classes.

    `dropout` is of the embeddings and of what each block adds, `attention_dropout` of the attention weights, which the
    fused kernel cannot draw from a key.
    """

    image: int | tuple[int, ...]
    patch: int | tuple[int, ...]
    layers: int
    heads: int
    width: int
    inner: int
    channels: int = 3
    head: Head = "classifier"
    num_labels: int = 2
    labels: tuple[str, ...] | None = None
    activation: str = "gelu"
    qkv_bias: bool = True
    pooler_width: int | None = None
    pooler_activation: str = "tanh"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    attention: Literal["fused", "math"] = "fused"
    eps: float = 1e-12

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "width", "inner", "channels", "num_labels"):
            if getattr(self, name) < 1:
                raise ValueError(f"vit.Config: expected {name} of at least 1, came {getattr(self, name)}")
        if self.pooler_width is not None and self.pooler_width < 1:
            raise ValueError(f"vit.Config: expected pooler_width of at least 1 or None, came {self.pooler_width}")
        for name in ("image", "patch"):
            sizes = _pair(getattr(self, name))
            if len(sizes) != 2 or min(sizes) < 1:
                raise ValueError(f"vit.Config: expected {name} of one or two sizes from 1, came {getattr(self, name)}")
        for size, patch in zip(_pair(self.image), _pair(self.patch), strict=True):
            if size % patch:
                raise ValueError(
                    f"vit.Config: an image of {size} pixels does not divide into patches of {patch}; choose a size "
                    f"that is a multiple of {patch}"
                )
        if self.width % self.heads:
            raise ValueError(
                f"vit.Config: width {self.width} does not divide into {self.heads} heads; "
                f"choose a width that is a multiple of {self.heads}"
            )
        for name in ("dropout", "attention_dropout", "eps"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"vit.Config: expected {name} in [0, 1), came {getattr(self, name)}")
        known = {"head": HEADS, "activation": ACTIVATIONS, "pooler_activation": ACTIVATIONS}
        for name, choices in {**known, "attention": ("fused", "math")}.items():
            if getattr(self, name) not in choices:
                expected = ", ".join(map(repr, choices))
                raise ValueError(f"vit.Config: expected {name} of {expected}, came {getattr(self, name)!r}")
        if self.labels is not None and len(self.labels) != self.num_labels:
            raise ValueError(f"vit.Config: expected {self.num_labels} labels, as num_labels says, came {self.labels}")
        if self.attention == "fused" and self.attention_dropout > 0.0:
            raise ValueError(
                f"vit.Config: fused attention cannot drop weights by a key, came attention_dropout="
                f"{self.attention_dropout}; choose attention='math' or attention_dropout=0.0"
            )

    @property
    def patch_size(self) -> tuple[int, int]:
        height, width = _pair(self.patch)
        return height, width

    @property
    def patches(self) -> int:
        (high, wide), (tall, broad) = _pair(self.image), _pair(self.patch)
        return (high // tall) * (wide // broad)

    def check(self, images: Tensor) -> None:
        """Raise unless images are floating-point (B, C, height, width) of this size."""
        wanted = (self.channels, *_pair(self.image))
        if images.ndim != 4 or images.shape[1:] != wanted:
            expected = f"images (B, {', '.join(map(str, wanted))}), channels first"
            raise ValueError(f"vit: expected {expected}, came {tuple(images.shape)}; resize or permute them")
        if not images.is_floating_point():
            raise TypeError(f"vit: expected floating-point images, came {images.dtype}; scale them, images / 255")


def _pair(size: int | tuple[int, ...]) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else size
