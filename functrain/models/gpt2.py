"""GPT-2: a decoder of pre-norm blocks with learned positions and a head tied to the token embedding.

B batch, T tokens, L layers, D width, H heads, K = D / H width of a head, C context, V vocabulary.

Parameters are named and laid out as in the published checkpoints, linear weights (in, out):
`wte` (V, D), `wpe` (C, D), `blocks/i/ln_1`, `blocks/i/attn/qkv` (D, 3 D), `blocks/i/attn/out` (D, D), `blocks/i/ln_2`,
`blocks/i/mlp/up` (D, 4 D), `blocks/i/mlp/down` (4 D, D), `ln_f`; norms and linear layers have `weight` and `bias`.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from functrain import nn, random
from functrain.models import cache as caches
from functrain.models import gpt2_layout, hf
from functrain.models.cache import Cache
from functrain.models.gpt2_layout import NAMES
from functrain.models.labels import Labels
from functrain.models.sharding_rules import gpt2 as sharding
from functrain.progress import Progress
from functrain.tree import Params, elsewhere

__all__ = ["HF", "NAMES", "Cache", "Config", "apply", "apply_cached", "from_hf", "hidden", "init", "init_cache",
           "labels", "sharding", "to_hf"]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of a GPT-2.

    `dropout` is of the embeddings and of what each block adds. `attention_dropout` is of the attention weights, which
    the fused kernel cannot draw from a key. "math" attention is on a CPU the faster one for short contexts; see
    `functrain.nn.attention`.
    """

    vocab: int
    context: int
    layers: int
    heads: int
    width: int
    dropout: float = 0.0
    attention_dropout: float = 0.0
    attention: Literal["fused", "math"] = "fused"
    bias: bool = True
    eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("vocab", "context", "layers", "heads", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"gpt2.Config: expected {name} of at least 1, came {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"gpt2.Config: expected heads that divide the width {self.width}, came {self.heads}")
        for name in ("dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"gpt2.Config: expected {name} in [0, 1), came {getattr(self, name)}")
        if not 0.0 <= self.eps < 1.0:
            raise ValueError(f"gpt2.Config: expected eps in [0, 1), came {self.eps}")
        if self.attention not in ("fused", "math"):
            raise ValueError(f"gpt2.Config: expected attention 'fused' or 'math', came {self.attention!r}")
        if self.attention == "fused" and self.attention_dropout > 0.0:
            raise ValueError(
                f"gpt2.Config: fused attention cannot drop weights by a key, came attention_dropout="
                f"{self.attention_dropout}; choose attention='math' or attention_dropout=0.0"
            )


def init(config: Config, key: Tensor) -> Params:
    """Draw initial parameters, float32, on the key's device.

    Weights are normal with deviation 0.02, those of `attn/out` and `mlp/down`, which add to the residual stream, with
    0.02 / sqrt(2 L); biases are 0 and norms 1.

    >>> config = ft.models.gpt2.Config(vocab=256, context=16, layers=2, heads=2, width=8)
    >>> params = ft.models.gpt2.init(config, ft.random.key(0))
    >>> ft.tree.size(params), params["blocks"][0]["attn"]["qkv"]["weight"].shape
    (3936, torch.Size([8, 24]))
    """
    width, residual = config.width, 0.02 / (2 * config.layers) ** 0.5
    tokens, positions, blocks = random.split(key, 3).unbind()

    def normal(key: Tensor, *shape: int, deviation: float = 0.02) -> Tensor:
        return random.normal(key, shape) * deviation

    def with_bias(weight: Tensor) -> Params:
        return {"weight": weight, "bias": weight.new_zeros(weight.shape[-1])} if config.bias else {"weight": weight}

    def norm() -> Params:
        return with_bias(torch.ones(width, device=key.device))

    def block(key: Tensor) -> Params:
        qkv, out, up, down = random.split(key, 4).unbind()
        return {
            "ln_1": norm(),
            "attn": {
                "qkv": with_bias(normal(qkv, width, 3 * width)),
                "out": with_bias(normal(out, width, width, deviation=residual)),
            },
            "ln_2": norm(),
            "mlp": {
                "up": with_bias(normal(up, width, 4 * width)),
                "down": with_bias(normal(down, 4 * width, width, deviation=residual)),
            },
        }

    return {
        "wte": normal(tokens, config.vocab, width),
        "wpe": normal(positions, config.context, width),
        "blocks": [block(key) for key in random.split(blocks, config.layers).unbind()],
        "ln_f": norm(),
    }


def apply(params: Params, tokens: Tensor, config: Config, *, key: Tensor | None = None) -> Tensor:
    """Return the logits of the token after each token, (B, T, V). Without a key nothing is dropped.

    >>> config = ft.models.gpt2.Config(vocab=256, context=16, layers=2, heads=2, width=8)
    >>> params = ft.models.gpt2.init(config, ft.random.key(0))
    >>> ft.models.gpt2.apply(params, torch.tensor([[1, 2, 3]]), config).shape
    torch.Size([1, 3, 256])
    """
    return hidden(params, tokens, config, key=key) @ params["wte"].mT  # (B, T, V)


def hidden(params: Params, tokens: Tensor, config: Config, *, key: Tensor | None = None) -> Tensor:
    """Return what the head multiplies: `apply(...)` equals `hidden(...) @ params["wte"].T`. Shape (B, T, D).

    Raises: ValueError for tokens that are not (B, T) with T up to the context, TypeError unless they are integers.

    >>> config = ft.models.gpt2.Config(vocab=256, context=16, layers=2, heads=2, width=8)
    >>> params = ft.models.gpt2.init(config, ft.random.key(0))
    >>> ft.models.gpt2.hidden(params, torch.tensor([[1, 2, 3]]), config).shape
    torch.Size([1, 3, 8])
    """
    _check_tokens(tokens, config)
    count = tokens.shape[1]
    if config.dropout == config.attention_dropout == 0.0:
        key = None  # keys that nothing draws from would still be inputs of every block, and be computed
    keys = [None] * (config.layers + 1) if key is None else list(random.split(key, config.layers + 1).unbind())
    x = nn.embedding(tokens, params["wte"]) + params["wpe"][:count]  # (B, T, D)
    x = nn.dropout(x, config.dropout, keys[0])

    def block(layer: tuple[Params, Tensor | None], x: Tensor) -> Tensor:
        params, key = layer
        weights_key, attention_key, mlp_key = (None, None, None) if key is None else random.split(key, 3).unbind()
        q, k, v = _heads(params, x, config)  # (B, H, T, K)
        seen = nn.attention(
            q, k, v, causal=True, dropout_rate=config.attention_dropout, key=weights_key,
            heads=config.heads, implementation=config.attention,
        )  # fmt: skip
        return _add(params, x, seen, config, attention_key, mlp_key)

    x = nn.stack(block, list(zip(params["blocks"], keys[1:], strict=True)), x)
    return nn.layer_norm(x, **params["ln_f"], eps=config.eps)


def init_cache(
    config: Config, batch: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Cache:
    """Make a cache that has read nothing.

    >>> config = ft.models.gpt2.Config(vocab=256, context=16, layers=2, heads=2, width=8)
    >>> cache = ft.models.gpt2.init_cache(config, batch=1)
    >>> cache.keys[0].shape, cache.length
    (torch.Size([1, 2, 16, 4]), tensor(0))
    """
    each, windows = config.width // config.heads, [None] * config.layers
    return caches.empty(batch, config.context, config.heads, each, windows, dtype, device)


def apply_cached(
    params: Params, tokens: Tensor, cache: Cache, config: Config, *, mask: Tensor | None = None
) -> tuple[Tensor, Cache]:
    """Return the logits after each of the next T tokens, (B, T, V), and the cache that has read them too.

    Equals the last T of `apply` on all tokens read; with `mask` (B, T), false at padding, which rows may begin with, on
    each row's tokens. The caller keeps `cache.length + T` within the context: the length
    is a tensor, so that no length compiles anew, and reading it here would wait for the device.

    >>> config = ft.models.gpt2.Config(vocab=256, context=16, layers=2, heads=2, width=8)
    >>> params = ft.models.gpt2.init(config, ft.random.key(0))
    >>> cache = ft.models.gpt2.init_cache(config, batch=1)
    >>> logits, cache = ft.models.gpt2.apply_cached(params, torch.tensor([[1, 2, 3]]), cache, config)
    >>> logits.shape, cache.length
    (torch.Size([1, 3, 256]), tensor(3))
    """
    _check_tokens(tokens, config)
    now, after = caches.reading(cache, tokens, mask, [None])
    x = nn.embedding(tokens, params["wte"]) + nn.embedding(now.positions, params["wpe"])  # (B, T, D)
    keys, values = [], []
    for layer, old_keys, old_values in zip(params["blocks"], cache.keys, cache.values, strict=True):
        q, k, v = _heads(layer, x, config)  # (B, H, T, K)
        keys.append(caches.extended(old_keys, k, now, None)[0])  # (B, H, C, K)
        values.append(caches.extended(old_values, v, now, None)[0])  # (B, H, C, K)
        seen = nn.attention(q, keys[-1], values[-1], now.masks[None], implementation="math")
        x = _add(layer, x, seen, config, None, None)
    x = nn.layer_norm(x, **params["ln_f"], eps=config.eps)
    return x @ params["wte"].mT, after._replace(keys=tuple(keys), values=tuple(values))


def _heads(params: Params, x: Tensor, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    h = nn.layer_norm(x, **params["ln_1"], eps=config.eps)
    qkv = nn.linear(h, **params["attn"]["qkv"])  # (B, T, 3 D)
    q, k, v = rearrange(qkv, "b t (n h k) -> n b h t k", n=3, k=config.width // config.heads)  # (B, H, T, K)
    return q, k, v


def _add(
    params: Params, x: Tensor, seen: Tensor, config: Config, attention_key: Tensor | None, mlp_key: Tensor | None
) -> Tensor:
    out = nn.linear(rearrange(seen, "b h t k -> b t (h k)"), **params["attn"]["out"])  # (B, T, D)
    x = x + nn.dropout(out, config.dropout, attention_key)
    h = nn.layer_norm(x, **params["ln_2"], eps=config.eps)
    out = nn.linear(nn.gelu(nn.linear(h, **params["mlp"]["up"])), **params["mlp"]["down"])  # (B, T, D)
    return x + nn.dropout(out, config.dropout, mlp_key)


def _check_tokens(tokens: Tensor, config: Config) -> None:
    if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= config.context:
        raise ValueError(
            f"gpt2: expected tokens (B, T) with T from 1 to the context {config.context}, came {tuple(tokens.shape)}"
        )
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"gpt2: expected int64 or int32 tokens, came {tokens.dtype}; pass tokens.long()")


def labels(config: Config) -> Labels:
    """Say which parameters decay, how deep they lie and which are matrices of hidden layers, for `ft.optim`.

    >>> ft.models.gpt2.labels(ft.models.gpt2.Config(vocab=256, context=16, layers=2, heads=2, width=8)).depth("ln_f")
    3
    """
    return Labels(layers=config.layers, embeddings=("wte", "wpe"), first=("wte", "wpe"))


def from_hf(folder: hf.Folder, *, progress: Progress | None = None) -> tuple[Params, Config]:
    """Load the parameters, in the dtype of the files, and the config of a GPT-2 in a folder of transformers.

    Logits equal those of `transformers.GPT2LMHeadModel` to rounding. Attention is "fused" unless weights are dropped.
    `progress` counts bytes of the files.
    Raises: CheckpointError of `functrain.checkpoint`, which names the file, the field or tensor, and a way out.

    >>> from tempfile import TemporaryDirectory
    >>> config = ft.models.gpt2.Config(vocab=256, context=16, layers=2, heads=2, width=8)
    >>> params = ft.models.gpt2.init(config, ft.random.key(0))
    >>> with TemporaryDirectory() as folder:
    ...     loaded, _ = ft.models.gpt2.from_hf(ft.models.gpt2.to_hf(f"{folder}/mine", params, config))
    >>> torch.equal(loaded["wte"], params["wte"])
    True
    """
    return hf.read(folder, HF, progress)


def to_hf(
    folder: hf.Folder,
    params: Params,
    config: Config,
    *,
    end: int | None = None,
    files: Mapping[str, bytes] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Save parameters and config as a folder that transformers loads bit for bit; return its path.

    `end` is the token that begins and ends a text, `files` what else stands in the folder, such as a tokenizer. Equals
    both again under `from_hf`, but for `attention`. `progress` counts bytes of tensors.
    Raises: CheckpointError of `functrain.checkpoint`; the folder then is as it was.

    >>> from tempfile import TemporaryDirectory
    >>> config = ft.models.gpt2.Config(vocab=256, context=16, layers=2, heads=2, width=8)
    >>> params = ft.models.gpt2.init(config, ft.random.key(0))
    >>> with TemporaryDirectory() as folder:
    ...     sorted(file.name for file in ft.models.gpt2.to_hf(f"{folder}/mine", params, config).iterdir())
    ['config.json', 'model.safetensors']
    """
    return hf.write(folder, params, config, HF, {"bos_token_id": end, "eos_token_id": end}, files, progress)


def _config(*, attention_dropout: float, **fields: Any) -> Config:
    attention: Literal["fused", "math"] = "math" if attention_dropout > 0.0 else "fused"
    return Config(attention=attention, attention_dropout=attention_dropout, **fields)


HF = gpt2_layout.layout(_config, init)

elsewhere.furnish(__name__)
