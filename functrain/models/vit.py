"""ViT: an encoder of pre-norm blocks over the patches of an image, which a class token stands before.

B batch, C channels, P patches of U x W pixels, T = P + 1 tokens, L layers, D width, H heads, K = D / H width of a head,
F inner width, N labels.

Linear weights are (in, out), and norms and linear layers have `weight` and `bias`: `embeddings/patches` (D, C, U, W),
`embeddings/cls` (1, 1, D), `embeddings/positions` (1, T, D), `blocks/i/norm_1`, `blocks/i/attn/{qkv,out}` (D, 3 D),
(D, D), `blocks/i/norm_2`, `blocks/i/mlp/{up,down}` (D, F), (F, D), `norm`, and, as the head needs it, `classifier`
(D, N) or `pooler` (D, pooler_width).

Source: Dosovitskiy et al. 2020 (arXiv:2010.11929).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from functrain import nn, random
from functrain.models import hf, vit_layout
from functrain.models.activations import ACTIVATIONS
from functrain.models.labels import Labels
from functrain.models.sharding_rules import vit as sharding
from functrain.models.vit_config import Config, Head
from functrain.progress import Progress
from functrain.tree import Params, elsewhere

__all__ = ["HF", "Config", "apply", "from_hf", "hidden", "init", "labels", "sharding", "to_hf"]


def init(config: Config, key: Tensor) -> Params:
    """Draw initial parameters, float32, on the key's device: weights normal with deviation 0.02, biases 0, norms 1.

    To put a head on the parameters of a folder: `{**init(config, key), **params}`.

    >>> config = ft.models.vit.Config(image=8, patch=4, channels=1, layers=2, heads=2, width=8, inner=16)
    >>> params = ft.models.vit.init(config, ft.random.key(0))
    >>> params["embeddings"]["positions"].shape, params["classifier"]["weight"].shape
    (torch.Size([1, 5, 8]), torch.Size([8, 2]))
    """
    width = config.width
    patches, cls, positions, blocks, head = random.split(key, 5).unbind()

    def normal(key: Tensor, *shape: int) -> Tensor:
        return random.normal(key, shape) * 0.02

    def linear(key: Tensor, inputs: int, outputs: int, bias: bool = True) -> Params:
        weight = normal(key, inputs, outputs)
        return {"weight": weight, "bias": weight.new_zeros(outputs)} if bias else {"weight": weight}

    def norm() -> Params:
        return {"weight": torch.ones(width, device=key.device), "bias": torch.zeros(width, device=key.device)}

    def block(key: Tensor) -> Params:
        qkv, out, up, down = random.split(key, 4).unbind()
        return {
            "norm_1": norm(),
            "attn": {"qkv": linear(qkv, width, 3 * width, config.qkv_bias), "out": linear(out, width, width)},
            "norm_2": norm(),
            "mlp": {"up": linear(up, width, config.inner), "down": linear(down, config.inner, width)},
        }

    convolution = normal(patches, width, config.channels, *config.patch_size)
    params: Params = {
        "embeddings": {
            "patches": {"weight": convolution, "bias": convolution.new_zeros(width)},
            "cls": normal(cls, 1, 1, width),
            "positions": normal(positions, 1, config.patches + 1, width),
        },
        "blocks": [block(key) for key in random.split(blocks, config.layers).unbind()],
        "norm": norm(),
    }
    if config.head == "classifier":
        params["classifier"] = linear(head, width, config.num_labels)
    if config.head == "pooled":
        params["pooler"] = linear(head, width, config.pooler_width or width)
    return params


def apply(params: Params, images: Tensor, config: Config, *, key: Tensor | None = None) -> Tensor:
    """Return what the config's head makes of images (B, C, height, width); without a key nothing is dropped.

    It is (B, N) of "classifier", (B, pooler_width) of "pooled" and (B, T, D) of "none".
    Raises: as `hidden`.

    >>> config = ft.models.vit.Config(image=8, patch=4, channels=1, layers=2, heads=2, width=8, inner=16)
    >>> params = ft.models.vit.init(config, ft.random.key(0))
    >>> ft.models.vit.apply(params, torch.zeros(3, 1, 8, 8), config).shape
    torch.Size([3, 2])
    """
    x = hidden(params, images, config, key=key)
    if config.head == "classifier":
        return nn.linear(x[:, 0], **params["classifier"])  # (B, N)
    if config.head == "pooled":
        return ACTIVATIONS[config.pooler_activation](nn.linear(x[:, 0], **params["pooler"]))
    return x


def hidden(params: Params, images: Tensor, config: Config, *, key: Tensor | None = None) -> Tensor:
    """Return the last norm of the class token and each patch, (B, T, D). Without a key nothing is dropped.

    Raises: ValueError for images that are not (B, C, height, width) of the config's size, TypeError unless they are
    floating-point.

    >>> config = ft.models.vit.Config(image=8, patch=4, channels=1, layers=2, heads=2, width=8, inner=16)
    >>> params = ft.models.vit.init(config, ft.random.key(0))
    >>> ft.models.vit.hidden(params, torch.zeros(3, 1, 8, 8), config).shape
    torch.Size([3, 5, 8])
    """
    config.check(images)
    if config.dropout == config.attention_dropout == 0.0:
        key = None  # keys that nothing draws from would still be inputs of every block, and be computed
    keys = [None] * (config.layers + 1) if key is None else list(random.split(key, config.layers + 1).unbind())
    embeddings = params["embeddings"]
    height, width = config.patch_size
    # a convolution whose stride is its kernel is one product
    x = rearrange(images, "b c (y u) (x w) -> b (y x) (c u w)", u=height, w=width)  # (B, P, C U W)
    x = nn.linear(x, embeddings["patches"]["weight"].flatten(1).mT, embeddings["patches"]["bias"])  # (B, P, D)
    x = torch.cat([embeddings["cls"].expand(x.shape[0], -1, -1), x], 1) + embeddings["positions"]  # (B, T, D)
    x = nn.dropout(x, config.dropout, keys[0])

    def block(layer: tuple[Params, Tensor | None], x: Tensor) -> Tensor:
        params, key = layer
        weights_key, attention_key, mlp_key = (None, None, None) if key is None else random.split(key, 3).unbind()
        qkv = nn.linear(nn.layer_norm(x, **params["norm_1"], eps=config.eps), **params["attn"]["qkv"])  # (B, T, 3 D)
        q, k, v = rearrange(qkv, "b t (n h k) -> n b h t k", n=3, k=config.width // config.heads)  # (B, H, T, K)
        attended = nn.attention(
            q, k, v, dropout_rate=config.attention_dropout, key=weights_key, heads=config.heads,
            implementation=config.attention,
        )  # fmt: skip
        out = nn.linear(rearrange(attended, "b h t k -> b t (h k)"), **params["attn"]["out"])  # (B, T, D)
        x = x + nn.dropout(out, config.dropout, attention_key)
        h = nn.linear(nn.layer_norm(x, **params["norm_2"], eps=config.eps), **params["mlp"]["up"])  # (B, T, F)
        out = nn.linear(ACTIVATIONS[config.activation](h), **params["mlp"]["down"])  # (B, T, D)
        return x + nn.dropout(out, config.dropout, mlp_key)

    x = nn.stack(block, list(zip(params["blocks"], keys[1:], strict=True)), x)
    return nn.layer_norm(x, **params["norm"], eps=config.eps)


def labels(config: Config) -> Labels:
    """Say which parameters decay, how deep they lie and which are matrices of hidden layers, for `ft.optim`.

    >>> config = ft.models.vit.Config(image=8, patch=4, channels=1, layers=2, heads=2, width=8, inner=16)
    >>> ft.models.vit.labels(config).depth("embeddings/cls"), ft.models.vit.labels(config).depth("classifier/bias")
    (0, 3)
    """
    return Labels(layers=config.layers, embeddings=("embeddings/cls", "embeddings/positions"), first=("embeddings/**",))


def from_hf(folder: hf.Folder, *, head: Head | None = None, progress: Progress | None = None) -> tuple[Params, Config]:
    """Load the parameters, in the dtype of the files, and the config of a ViT in a folder of transformers.

    The head is that of the folder's `architectures`, or `head`, whose tensors must be there; others are passed over.
    Results equal those of the class of transformers to rounding. Attention is "fused" unless weights are dropped.
    `progress` counts bytes of the files.
    Raises: CheckpointError of `functrain.checkpoint`, which names the file, the field or tensor, and a way out;
    ValueError for a head that there is not.

    >>> from tempfile import TemporaryDirectory
    >>> config = ft.models.vit.Config(image=8, patch=4, channels=1, layers=2, heads=2, width=8, inner=16)
    >>> params = ft.models.vit.init(config, ft.random.key(0))
    >>> with TemporaryDirectory() as folder:
    ...     path = ft.models.vit.to_hf(f"{folder}/mine", params, config)
    ...     loaded, its_config = ft.models.vit.from_hf(path, head="none")
    >>> its_config.head, "classifier" in loaded
    ('none', False)
    """
    return hf.read(folder, HF, progress, head=head)


def to_hf(
    folder: hf.Folder,
    params: Params,
    config: Config,
    *,
    files: Mapping[str, bytes] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Save parameters and config as a folder that transformers loads bit for bit; return its path.

    `files` is what else stands in the folder, such as the description of its images. Equals both again under `from_hf`,
    but for `attention`. `progress` counts bytes of tensors.
    Raises: CheckpointError of `functrain.checkpoint`; the folder then is as it was.

    >>> from tempfile import TemporaryDirectory
    >>> config = ft.models.vit.Config(image=8, patch=4, channels=1, layers=2, heads=2, width=8, inner=16)
    >>> params = ft.models.vit.init(config, ft.random.key(0))
    >>> with TemporaryDirectory() as folder:
    ...     sorted(file.name for file in ft.models.vit.to_hf(f"{folder}/mine", params, config).iterdir())
    ['config.json', 'model.safetensors']
    """
    return hf.write(folder, params, config, HF, {}, files, progress)


def _config(*, attention_dropout: float, **fields: Any) -> Config:
    attention: Literal["fused", "math"] = "math" if attention_dropout > 0.0 else "fused"
    return Config(attention=attention, attention_dropout=attention_dropout, **fields)


HF = vit_layout.layout(_config, init)

elsewhere.furnish(__name__)
