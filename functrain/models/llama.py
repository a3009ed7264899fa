"""The Llama family: decoders of pre-norm blocks with rotary positions, grouped queries and gated MLPs.

By its config one of Llama 2 and 3, Mistral, Qwen2, Qwen3, Mixtral and Qwen3-MoE.

B batch, T tokens, D width, H heads, G heads of keys and values, K width of a head, C context, V vocabulary, F inner
width, E experts.

Linear weights are (in, out): `embed` (V, D), `blocks/i/norm_1`, `blocks/i/attn/{q,k,v,out}`, with QK-norm
`blocks/i/attn/{q_norm,k_norm}` (K,), `blocks/i/norm_2`, `blocks/i/mlp/{gate,up,down}`, or `blocks/i/experts/router`
(D, E) and `blocks/i/experts/{gate,up,down}` (E, D, F) and (E, F, D), `norm`, and `head` (V, D) unless it is tied.

Source: Touvron et al. 2023 (arXiv:2302.13971, arXiv:2307.09288); Jiang et al. 2023 (arXiv:2310.06825) and 2024
(arXiv:2401.04088); Yang et al. 2024 and 2025 (arXiv:2407.10671, arXiv:2505.09388).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functrain import losses, nn, random
from functrain.models import cache as caches
from functrain.models import hf, llama_layout
from functrain.models.cache import Cache
from functrain.models.llama_config import Config
from functrain.models.llama_layers import add, heads
from functrain.models.llama_parameters import init, labels
from functrain.models.positions import positions_of
from functrain.models.sharding_rules import llama as sharding
from functrain.progress import Progress
from functrain.tree import Params, elsewhere

__all__ = ["HF", "Cache", "Config", "apply", "apply_cached", "from_hf", "head", "hidden", "hidden_and_balance",
           "init", "init_cache", "labels", "sharding", "to_hf"]  # fmt: skip


def apply(
    params: Params,
    tokens: Tensor,
    config: Config,
    *,
    documents: Tensor | None = None,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    key: Tensor | None = None,
) -> Tensor:
    """Return the logits of the token after each token, (B, T, V). The arguments are those of `hidden`.

    >>> config = ft.models.llama.Config(vocab=256, context=16, layers=2, heads=2, width=8, inner=16)
    >>> params = ft.models.llama.init(config, ft.random.key(0))
    >>> ft.models.llama.apply(params, torch.tensor([[1, 2, 3]]), config).shape
    torch.Size([1, 3, 256])
    """
    x = hidden(params, tokens, config, documents=documents, positions=positions, mask=mask, key=key)
    return x @ head(params).mT  # (B, T, V)


def head(params: Params) -> Tensor:
    """Return the matrix (V, D) that makes logits of `hidden`: `apply(...)` equals `hidden(...) @ head(params).T`.

    >>> config = ft.models.llama.Config(vocab=256, context=16, layers=1, heads=1, width=8, inner=16, tied=True)
    >>> params = ft.models.llama.init(config, ft.random.key(0))
    >>> ft.models.llama.head(params) is params["embed"]
    True
    """
    weight: Tensor = params["head"] if "head" in params else params["embed"]
    return weight


def hidden(
    params: Params,
    tokens: Tensor,
    config: Config,
    *,
    documents: Tensor | None = None,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    key: Tensor | None = None,
) -> Tensor:
    """Return what the head multiplies, (B, T, D). Without a key nothing is dropped.

    With `documents` (B, T), the number of the document of each token, several are packed in a row, and none sees
    another; with `mask` (B, T), true at tokens and false at padding, nothing sees padding. `positions` (B, T) are, if
    not given, counted anew in each document, and from a row's first token that is no padding.
    Raises: ValueError for tokens that are not (B, T) with T up to the context, or others of another shape; TypeError
    unless they are integers; IndexError for a token outside the vocabulary on the CPU.

    >>> config = ft.models.llama.Config(vocab=256, context=16, layers=2, heads=2, width=8, inner=16)
    >>> params = ft.models.llama.init(config, ft.random.key(0))
    >>> ft.models.llama.hidden(params, torch.tensor([[1, 2, 3]]), config, documents=torch.tensor([[0, 0, 1]])).shape
    torch.Size([1, 3, 8])
    """
    return _run(params, tokens, config, documents, positions, mask, key, balanced=False)[0]


def hidden_and_balance(
    params: Params,
    tokens: Tensor,
    config: Config,
    *,
    documents: Tensor | None = None,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    key: Tensor | None = None,
) -> tuple[Tensor, losses.Loss]:
    """Return `hidden` of a mixture of experts, and `ft.losses.load_balancing` of all its layers and real tokens.

    To train on both, add it as a mean times a coefficient: with `loss` of the tokens, `loss._replace(total=loss.total +
    0.01 * loss.weight * balance.total / balance.weight)`.
    Raises: as `hidden`; ValueError for a config without experts.

    >>> config = ft.models.llama.Config(vocab=256, context=16, layers=1, heads=2, width=8, inner=16, experts=4)
    >>> params = ft.models.llama.init(config, ft.random.key(0))
    >>> x, balance = ft.models.llama.hidden_and_balance(params, torch.tensor([[1, 2, 3]]), config)
    >>> balance.weight
    tensor(3.)
    """
    if not config.expert_layers:
        raise ValueError("llama: expected a config with experts, came none; take `hidden`, there is nothing to balance")
    x, load = _run(params, tokens, config, documents, positions, mask, key, balanced=True)
    return x, losses.load_balancing(load)


def _run(
    params: Params,
    tokens: Tensor,
    config: Config,
    documents: Tensor | None,
    positions: Tensor | None,
    mask: Tensor | None,
    key: Tensor | None,
    *,
    balanced: bool,
) -> tuple[Tensor, Any]:
    config.check(tokens, documents=documents, positions=positions, mask=mask)
    count = tokens.shape[1]
    windows = caches.bounded(config.windows, count)
    dropped = key is not None and config.attention_dropout > 0.0
    alone = documents is not None and mask is None and not any(windows) and not dropped
    # a CPU's kernel takes documents one by one; of a mask all layers have the same
    apart = documents if alone and config.attention == "fused" and tokens.device.type == "cpu" else None
    if apart is None and (any(windows) or documents is not None or mask is not None):
        # a mask for each layer even where another has a window: layers that differ in its values are one kind
        of_window = {
            window: nn.attention_mask(
                count, causal=True, window=window, documents=documents, key_mask=mask, device=tokens.device
            )
            for window in set(windows)
        }
        masks: list[Tensor | None] = [of_window[window] for window in windows]
    else:
        masks = [None] * config.layers
    if positions is None:
        positions = positions_of(tokens, documents, mask)
    cos, sin = nn.rotary_angles(positions, config.width_of_head, config.rope)  # (B, T, K / 2)
    keys = list(random.split(key, config.layers).unbind()) if key is not None and dropped else [None] * config.layers

    def block(layer: Any, state: Any, cos: Tensor, sin: Tensor, real: Tensor | None, documents: Tensor | None) -> Any:
        (params, seen, key), (x, load) = layer, state
        q, k, v = heads(params, x, cos, sin, config)  # (B, H, T, K), (B, G, T, K)
        attended = nn.attention(
            q, k, v, seen, causal=seen is None, documents=documents, dropout_rate=config.attention_dropout, key=key,
            heads=config.heads, implementation=config.attention,
        )  # fmt: skip
        return add(params, x, attended, config, load, real)

    load = None
    x = nn.embedding(tokens, params["embed"])  # (B, T, D)
    if balanced:
        wide = [torch.zeros(shape, device=x.device) for shape in ((config.experts,), (config.experts,), ())]
        load = losses.ExpertLoad(*wide)
    layers = list(zip(params["blocks"], masks, keys, strict=True))
    x, load = nn.stack(block, layers, (x, load), cos, sin, mask, apart)
    return nn.rms_norm(x, **params["norm"], eps=config.eps), load


def init_cache(
    config: Config, batch: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Cache:
    """Make a cache that has read nothing; layers with a window keep no more than they see.

    >>> config = ft.models.llama.Config(vocab=256, context=16, layers=2, heads=2, width=8, inner=16, window=4)
    >>> ft.models.llama.init_cache(config, batch=1).keys[0].shape
    torch.Size([1, 2, 3, 4])
    """
    each, count = config.width_of_head, config.heads_of_keys
    return caches.empty(batch, config.context, count, each, config.windows, dtype, device)


def apply_cached(
    params: Params, tokens: Tensor, cache: Cache, config: Config, *, mask: Tensor | None = None
) -> tuple[Tensor, Cache]:
    """Return the logits after each of the next T tokens, (B, T, V), and the cache that has read them too.

    Equals the last T of `apply` on all tokens read, but with the "dynamic" rope beyond its original context, whose keys
    stay as they were turned. `mask` (B, T) is false at padding, which rows may begin with. The caller keeps
    `cache.length + T` within the context: the length is a tensor, so that no length compiles anew.

    >>> config = ft.models.llama.Config(vocab=256, context=16, layers=2, heads=2, width=8, inner=16)
    >>> params = ft.models.llama.init(config, ft.random.key(0))
    >>> cache = ft.models.llama.init_cache(config, batch=1)
    >>> logits, cache = ft.models.llama.apply_cached(params, torch.tensor([[1, 2, 3]]), cache, config)
    >>> logits.shape, cache.length
    (torch.Size([1, 3, 256]), tensor(3))
    """
    config.check(tokens, mask=mask)
    windows = caches.bounded(config.windows, config.context)
    now, after = caches.reading(cache, tokens, mask, windows)
    cos, sin = nn.rotary_angles(now.positions, config.width_of_head, config.rope)  # (B, T, K / 2)
    x = nn.embedding(tokens, params["embed"])  # (B, T, D)
    keys, values = [], []
    for layer, old_k, old_v, window in zip(params["blocks"], cache.keys, cache.values, windows, strict=True):
        q, k, v = heads(layer, x, cos, sin, config)
        (k, kept_k), (v, kept_v) = caches.extended(old_k, k, now, window), caches.extended(old_v, v, now, window)
        keys.append(kept_k)
        values.append(kept_v)
        attended = nn.attention(q, k, v, now.masks[window], implementation=config.attention)
        x, _ = add(layer, x, attended, config, None, None)
    x = nn.rms_norm(x, **params["norm"], eps=config.eps)
    return x @ head(params).mT, after._replace(keys=tuple(keys), values=tuple(values))


def from_hf(folder: hf.Folder, *, progress: Progress | None = None) -> tuple[Params, Config]:
    """Load the parameters, in the dtype of the files, and the config of a model of the family in a folder of
    transformers: llama, mistral, qwen2, qwen3, mixtral or qwen3_moe.

    Logits equal those of its class for causal language models to rounding. For a text longer than the context of its
    config, replace that: the rope goes on beyond it. `progress` counts bytes of the files.
    Raises: CheckpointError of `functrain.checkpoint`, which names the file, the field or tensor, and a way out.

    >>> from tempfile import TemporaryDirectory
    >>> config = ft.models.llama.Config(vocab=256, context=16, layers=2, heads=2, width=8, inner=16)
    >>> params = ft.models.llama.init(config, ft.random.key(0))
    >>> with TemporaryDirectory() as folder:
    ...     loaded, _ = ft.models.llama.from_hf(ft.models.llama.to_hf(f"{folder}/mine", params, config))
    >>> torch.equal(loaded["embed"], params["embed"])
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

    It is of the first of llama, mistral, qwen2, qwen3, mixtral and qwen3_moe that computes this config. `end` is the
    token that begins and ends a text, `files` what else stands in the folder, such as a tokenizer. Equals both again
    under `from_hf`, but for `attention`. `progress` counts bytes of tensors.
    Raises: CheckpointError of `functrain.checkpoint`; the folder then is as it was.

    >>> from tempfile import TemporaryDirectory
    >>> config = ft.models.llama.Config(vocab=256, context=16, layers=2, heads=2, width=8, inner=16)
    >>> params = ft.models.llama.init(config, ft.random.key(0))
    >>> with TemporaryDirectory() as folder:
    ...     sorted(file.name for file in ft.models.llama.to_hf(f"{folder}/mine", params, config).iterdir())
    ['config.json', 'model.safetensors']
    """
    config = llama_layout.resolved(config)
    more = {"bos_token_id": end, "eos_token_id": end}
    return hf.write(
        folder, params, config, llama_layout.layout_of(config, HF, f"{folder}/config.json"), more, files, progress
    )


HF = llama_layout.layouts(init)

elsewhere.furnish(__name__)
